"""Keys, request slots, base64 and the shape of bodies."""

from __future__ import annotations

import base64
import contextlib
import time

import pytest

from babydoctor.schema import UserError
from babydoctor.serve.api.admission import (
    Keys,
    RequestSlots,
    bearer_key,
    check_image_count,
    check_json_shape,
    check_request,
    decode_image,
)
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import GenerateRequest
from babydoctor.serve.settings import (
    Limits,
    Secrets,
    ServeSettings,
    check_exposure,
    is_loopback,
    load_secrets,
    load_settings,
)


def test_only_complete_keys_are_accepted():
    keys = Keys(["a" * 16, "b" * 16])
    assert keys.accepts("a" * 16) and keys.accepts("b" * 16)
    assert not any(map(keys.accepts, ["", "a" * 15, "a" * 17, "c" * 16, "é"]))
    assert not Keys([]) and not Keys([]).accepts("")


def test_the_key_is_read_from_either_header():
    assert bearer_key([(b"authorization", b"Bearer abc")]) == "abc"
    assert bearer_key([(b"authorization", b"bearer  abc ")]) == "abc"
    assert bearer_key([(b"x-api-key", b"abc")]) == "abc"
    assert bearer_key([(b"authorization", b"Basic abc")]) == ""


def test_a_request_beyond_the_slots_is_refused_with_retry_after():
    slots = RequestSlots(num_slots=2, max_queue=1)
    for _ in range(3):
        slots.take()
    with pytest.raises(ApiError) as caught:
        slots.take()
    assert caught.value.status == 429 and 1 <= caught.value.retry_after_s <= 60
    slots.free(1.0)
    slots.take()
    for _ in range(3):
        slots.free(100.0)
    assert slots.taken == 0
    with pytest.raises(AssertionError):
        slots.free(1.0)


def test_retry_after_follows_the_duration_of_answers():
    fast, slow = RequestSlots(1, 4), RequestSlots(1, 4)
    for _ in range(50):
        for slots, seconds in ((fast, 0.1), (slow, 10.0)):
            slots.take()
            slots.free(seconds)
    assert fast.retry_after_s() < slow.retry_after_s()


def test_base64_is_strict_but_may_have_line_breaks():
    data = bytes(range(256))
    text = base64.b64encode(data).decode()
    assert decode_image("\n".join([text[:76], text[76:]]), 0) == data
    assert decode_image(f"data:image/png;base64,{text}", 0) == data


@pytest.mark.parametrize("text", ["", "!!!!", "abcde", "abcd=efg", "a===", "data:image/png,AAAA", "é" * 4])
def test_bad_base64_names_the_image(text: str):
    with pytest.raises(ApiError, match=r"images\[3\]") as caught:
        decode_image(text, 3)
    assert caught.value.status == 422


def test_the_number_of_images_must_match_their_markers():
    limits = Limits(max_images=1)
    check_image_count("<image> a", ["x"], limits)
    for prompt, images in (("a", ["x"]), ("<image>", []), ("<image><image>", ["x"]), ("<image><image>", ["x", "y"])):
        with pytest.raises(ApiError) as caught:
            check_image_count(prompt, images, limits)
        assert caught.value.status == 422


def test_a_long_prompt_is_refused_before_tokenizing():
    with pytest.raises(ApiError, match="100 characters; the limit is 99"):
        check_request(GenerateRequest(prompt="x" * 100), Limits(max_prompt_chars=99))


def test_json_that_is_too_deep_or_too_large_is_refused():
    check_json_shape(b'{"a": [[["' + b"[" * 1000 + b'"]]]}')
    for body in (b"[" * 1000, b'{"a":' * 1000, b"[[]]" * 50 + b"[" * 40):
        with pytest.raises(ApiError):
            check_json_shape(body)
    with pytest.raises(ApiError):
        check_json_shape(b"[" + b"0," * 100_000 + b"0]")


@pytest.mark.parametrize(
    "unit", [b'"', b'\\"', b'"\\', b'"a"', b"\\", b'"\\\\"', b"[]", b",", b'"[', b"a"], ids=lambda unit: repr(unit)
)
def test_checking_json_takes_linear_time(unit: bytes):
    body = b'"' + unit * (4_000_000 // len(unit))
    start = time.process_time()  # CPU time of this process, independent of other load
    with contextlib.suppress(ApiError):
        check_json_shape(body)
    assert time.process_time() - start < 3


def test_a_wrong_setting_is_named():
    with pytest.raises(UserError, match=r"limits\.max_queu.*did you mean 'limits\.max_queue'"):
        load_settings(None, ["limits.max_queu=3"])
    with pytest.raises(UserError, match=r"controller\.dispatch"):
        load_settings(None, ["controller.dispatch=random"])
    with pytest.raises(UserError, match="key=value"):
        load_settings(None, ["limits"])
    assert load_settings(None, ["remote_images.hosts=[a.example]"]).remote_images.hosts == ("a.example",)


def test_configs_serve_yaml_holds_the_defaults(pytestconfig: pytest.Config):
    assert load_settings(pytestconfig.rootpath / "configs/serve.yaml") == ServeSettings()


def test_secrets_come_from_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("k" * 20 + "  # for the ward\n\n# nobody\n")
    found = load_secrets({"BABYDOCTOR_API_KEYS": "a" * 16, "BABYDOCTOR_API_KEYS_FILE": str(file)})
    assert found.api_keys == ("a" * 16, "k" * 20) and found.registration is None
    assert "aaaa" not in repr(found)
    with pytest.raises(UserError, match="at least 16") as caught:
        load_secrets({"BABYDOCTOR_API_KEYS": "secret-short"})
    assert "secret-short" not in str(caught.value)


def test_listening_for_other_machines_needs_keys_and_the_secret():
    settings = ServeSettings()
    keys = Secrets(("k" * 16,), None)
    check_exposure("worker", "127.0.0.1", settings, Secrets())
    with pytest.raises(UserError, match="BABYDOCTOR_API_KEYS"):
        check_exposure("worker", "0.0.0.0", settings, Secrets())
    check_exposure("worker", "0.0.0.0", settings, keys)
    with pytest.raises(UserError, match="BABYDOCTOR_REGISTRATION_SECRET"):
        check_exposure("controller", "0.0.0.0", settings, keys)
    open_settings = load_settings(None, ["public_without_keys=true"])
    check_exposure("page", "0.0.0.0", open_settings, Secrets())
    assert is_loopback("::1") and is_loopback("localhost") and not is_loopback("example.org")

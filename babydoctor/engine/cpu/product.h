// Products of a decoding step: rows times weights in bfloat16, int8 or NF4, and LoRAs beside them.
//
// Weights are read once per step, in blocks of 64 outputs:
//   bfloat16 [out/64][in/2][64][2].
//   int8     [out/64][in/4][64][4], with a scale and a sum for each output.
//   NF4      [out/64][in/8][64] words of eight codes, with a scale for 64 inputs of an output: [out/64][in/64][64]. The
//            codes of inputs 0, 2, 4, 6 are in the lower half of a word, lowest first, those of 1, 3, 5, 7 in the upper.
// Sums are float32. Vectors are the compiler's own, so this runs on AVX-512, AVX2 and NEON; AVX-512's dot products and
// byte shuffles are used where they are. A row's result does not depend on the rows computed together with it.
#pragma once
#include <omp.h>
#include <sched.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;
typedef float F __attribute__((vector_size(64), aligned(4)));
typedef int32_t I __attribute__((vector_size(64), aligned(4)));
typedef uint32_t U __attribute__((vector_size(64), aligned(4)));
typedef uint16_t H __attribute__((vector_size(32), aligned(2)));
constexpr int BLOCK = 64;       // outputs that one kernel call computes
constexpr int ROWS = 6;         // rows that share a read of the weights; their sums fill AVX-512's registers
constexpr int NF4_INPUTS = 64;  // inputs that share a scale
constexpr int SPINS = 4000;

// `down` and `up` are a LoRA's products, null without one. int8 has `scales` and `sums`, NF4 has `scales` only.
struct Product { const void* weights; const float* scales; const int32_t* sums; int64_t out, in; const Product *down, *up; };

static F load(const float* p) { return *(const F*)p; }
static void store(float* p, F v) { *(F*)p = v; }
static F widen(const bf16* p) { return (F)(__builtin_convertvector(*(const H*)p, U) << 16); }
static uint32_t read32(const void* p) { uint32_t u; memcpy(&u, p, 4); return u; }
static F spread(float x) { return F{} + x; }
template <class T> static T rounded(T bits) { return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; }  // ties to even
static void narrow(bf16* p, F v) { *(H*)p = __builtin_convertvector(rounded((U)v), H); }
static float total(F v) {
  typedef float F8 __attribute__((vector_size(32)));
  typedef float F4 __attribute__((vector_size(16)));
  F8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  F4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[1]) + (b[2] + b[3]);
}
// The sums plus the products of 16 pairs of weights with one pair of inputs, all bfloat16.
static F add_pairs(F sums, U weights, uint32_t x) {
#ifdef __AVX512BF16__
  return (F)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x), (__m512bh)weights);
#else
  return sums + (F)(weights << 16) * (F)(U{} + (x << 16)) + (F)(weights & 0xffff0000) * (F)(U{} + (x & 0xffff0000));
#endif
}

// NF4's levels in bfloat16 (QLoRA, Dettmers et al. 2023).
alignas(64) constexpr bf16 LEVELS[32] = {
  0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
  0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80};

// The levels of the lowest code in each half of 16 words.
static U look_up(U words) {
#if defined(__AVX512BW__)  // an index has five bits, so the table holds the levels twice
  return (U)_mm512_permutexvar_epi16((__m512i)words, _mm512_load_si512(LEVELS));
#elif defined(__AVX2__)  // the lower and the upper bytes of the levels; an index with its highest bit set gives 0
  const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 50, 6, -54, -110, 61, -70, 0, -93, 37, 124, -83, -30, 16, 57, -128));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(-65, -65, -65, -66, -66, -66, -67, 0, 61, 62, 62, 62, 62, 63, 63, 63));
  __m256i parts[2];
  memcpy(parts, &words, sizeof words);
  for (__m256i& part : parts) {
    const __m256i codes = _mm256_and_si256(part, _mm256_set1_epi16(15));
    const __m256i lower = _mm256_shuffle_epi8(low, _mm256_or_si256(codes, _mm256_set1_epi16((short)0x8000)));
    part = _mm256_or_si256(lower, _mm256_shuffle_epi8(high, _mm256_or_si256(_mm256_slli_epi16(codes, 8), _mm256_set1_epi16(0x80))));
  }
  memcpy(&words, parts, sizeof words);
  return words;
#else
  U pairs;
  for (int i = 0; i < 16; i++) pairs[i] = LEVELS[words[i] & 15] | (uint32_t)LEVELS[words[i] >> 16 & 15] << 16;
  return pairs;
#endif
}

// Products of R rows and one block. Rows are bfloat16 or unsigned bytes around 128.
template <int R> static void multiply(const bf16* rows, int64_t in, const bf16* weights, float out[][BLOCK]) {
  F sums[R][4] = {};
  for (int64_t k = 0; k < in / 2; k++, weights += 2 * BLOCK) {
    if (R == 1) for (int i = 0; i < 4; i++) __builtin_prefetch((const char*)weights + 2048 + 64 * i);
    for (int i = 0; i < 4; i++) {
      U pair = *(const U*)(weights + 32 * i);
      for (int r = 0; r < R; r++) sums[r][i] = add_pairs(sums[r][i], pair, read32(rows + r * in + 2 * k));
    }
  }
  for (int r = 0; r < R; r++) for (int i = 0; i < 4; i++) store(out[r] + 16 * i, sums[r][i]);
}
template <int R> static void multiply(const uint8_t* rows, int64_t in, const int8_t* weights, float out[][BLOCK]) {
  I sums[R][4] = {};
  for (int64_t k = 0; k < in / 4; k++, weights += 4 * BLOCK) {
    if (R == 1) for (int i = 0; i < 4; i++) __builtin_prefetch((const char*)weights + 2048 + 64 * i);
    for (int i = 0; i < 4; i++) {
      I four = *(const I*)(weights + 64 * i);
      for (int r = 0; r < R; r++) {
        const uint8_t* x = rows + r * in + 4 * k;
#ifdef __AVX512VNNI__
        sums[r][i] = (I)_mm512_dpbusd_epi32((__m512i)sums[r][i], _mm512_set1_epi32(read32(x)), (__m512i)four);
#else
        sums[r][i] += (four << 24 >> 24) * x[0] + (four << 16 >> 24) * x[1] + (four << 8 >> 24) * x[2] + (four >> 24) * x[3];
#endif
      }
    }
  }
  for (int r = 0; r < R; r++) for (int i = 0; i < 4; i++) store(out[r] + 16 * i, __builtin_convertvector(sums[r][i], F));
}
template <int R> static void multiply(const bf16* rows, int64_t in, const uint32_t* words, const float* scales, float out[][BLOCK]) {
  memset(out, 0, R * sizeof *out);
  for (int64_t first = 0; first < in; first += NF4_INPUTS, scales += BLOCK) {
    F sums[R][4] = {};
    for (int64_t k = first; k < first + NF4_INPUTS; k += 8, words += BLOCK) {
      if (R == 1) for (int i = 0; i < 4; i++) __builtin_prefetch((const char*)words + 2048 + 64 * i);
      for (int i = 0; i < 4; i++) {
        U codes = *(const U*)(words + 16 * i);
        for (int j = 0; j < 4; j++, codes >>= 4) {
          const U pair = look_up(codes);
          for (int r = 0; r < R; r++) sums[r][i] = add_pairs(sums[r][i], pair, read32(rows + r * in + k + 2 * j));
        }
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 4; i++) store(out[r] + 16 * i, load(out[r] + 16 * i) + sums[r][i] * load(scales + 16 * i));
  }
}
template <int R = ROWS, class X, class... W> static void multiply_rows(int count, const X* rows, int64_t in, float out[][BLOCK], W... weights) {
  if constexpr (R > 1)
    if (count < R) return multiply_rows<R - 1>(count, rows, in, out, weights...);
  multiply<R>(rows, in, weights..., out);
}

// Rows of a product's input, in the form that its weights want.
struct Input {
  std::unique_ptr<bf16[]> halves;
  std::unique_ptr<uint8_t[]> bytes;
  std::unique_ptr<float[]> scales;
  Input(int64_t rows, int64_t width) : halves(new bf16[rows * width]), bytes(new uint8_t[rows * width]), scales(new float[rows]) {}
  void put(const Product& product, int64_t row, const float* x) {
    const int64_t in = product.in;
    if (!product.sums) {
      for (int64_t k = 0; k < in; k += 16) narrow(&halves[row * in + k], load(x + k));
      return;
    }
    float largest = 1e-9f;
    for (int64_t k = 0; k < in; k++) largest = std::max(largest, std::fabs(x[k]));
    scales[row] = largest / 127.f;
    for (int64_t k = 0; k < in; k++) bytes[row * in + k] = (uint8_t)(std::nearbyint(x[k] * (127.f / largest)) + 128.f);
  }
};

// The products of up to ROWS rows from `row` on with one block.
static void multiply_block(const Product& product, const Input& input, int64_t row, int count, int64_t first, float out[][BLOCK]) {
  const int64_t in = product.in;
  const bf16* halves = &input.halves[row * in];
  if (!product.scales) return multiply_rows(count, halves, in, out, (const bf16*)product.weights + first * in);
  if (!product.sums)
    return multiply_rows(count, halves, in, out, (const uint32_t*)product.weights + first * in / 8, product.scales + first * in / NF4_INPUTS);
  multiply_rows(count, &input.bytes[row * in], in, out, (const int8_t*)product.weights + first * in);
  for (int r = 0; r < count; r++)
    for (int i = 0; i < BLOCK; i++)  // bytes are 128 too large, which the sums of the weights take back
      out[r][i] = (out[r][i] - 128.f * product.sums[first + i]) * product.scales[first + i] * input.scales[row + r];
}

struct Barrier {
  std::atomic<int> arrived{0};
  void wait(int& phase, int threads) {
    phase += threads;
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == phase) return;
    // On a busy machine the others may not be running, so the core is given away before long.
    for (int spins = 0; arrived.load(std::memory_order_acquire) < phase; spins++)
      if (spins > SPINS) sched_yield();
  }
};


// One thread of a team that computes products of the same rows.
struct Worker {
  const int thread, threads;
  const int64_t rows;
  Barrier& barrier;
  const Input& input;
  float* lows;  // [rows, largest rank]: what a LoRA's first product computes, shared by the threads
  Input low;    // the input of its second product
  int phase = 0;
  Worker(int64_t rows, Barrier& barrier, const Input& input, float* lows, int64_t rank)
      : thread(omp_get_thread_num()), threads(omp_get_num_threads()), rows(rows), barrier(barrier), input(input), lows(lows), low(rows, rank) {}
  void wait() { barrier.wait(phase, threads); }

  // Compute this thread's blocks of a product, with its LoRA, and call take(row, first output, number of outputs, values).
  template <class Take> void compute(const Product& product, Take take) {
    if (product.down) {
      const int64_t rank = product.down->out;
      blocks(*product.down, nullptr, [=](int64_t r, int64_t first, int64_t count, const float* out) { memcpy(lows + r * rank + first, out, count * sizeof(float)); });
      wait();
      for (int64_t r = 0; r < rows; r++) low.put(*product.up, r, lows + r * rank);
    }
    blocks(product, product.up, take);
    wait();
  }
  template <class Take> void blocks(const Product& product, const Product* up, Take take) {
    const int64_t blocks = (product.out + BLOCK - 1) / BLOCK;
    float out[ROWS][BLOCK], added[ROWS][BLOCK];
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
      const int64_t first = block * BLOCK, size = std::min<int64_t>(BLOCK, product.out - first);
      for (int64_t row = 0; row < rows; row += ROWS) {
        const int count = (int)std::min<int64_t>(ROWS, rows - row);
        multiply_block(product, input, row, count, first, out);
        if (up) {
          multiply_block(*up, low, row, count, first, added);
          for (int r = 0; r < count; r++) for (int i = 0; i < BLOCK; i++) out[r][i] += added[r][i];
        }
        for (int r = 0; r < count; r++) take(row + r, first, size, out[r]);
      }
    }
  }
};

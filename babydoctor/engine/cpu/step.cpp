// A decoding step of a LLaMA on the CPU in one parallel region, and the products that it consists of.
//
// Weights are read once per step, in blocks of 64 outputs: bfloat16 [out/64][in/2][64][2], or int8 [out/64][in/4][64][4]
// with a scale and a sum for each output. Keys and values are bfloat16, in the KV cache's own slots. Sums are float32.
// Vectors are the compiler's own, so this runs on AVX-512, AVX2 and NEON; AVX-512's dot products are used where they are.
#include <omp.h>
#include <sched.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

typedef uint16_t bf16;
typedef float F __attribute__((vector_size(64), aligned(4)));
typedef int32_t I __attribute__((vector_size(64), aligned(4)));
typedef uint32_t U __attribute__((vector_size(64), aligned(4)));
typedef uint16_t H __attribute__((vector_size(32), aligned(2)));
constexpr int BLOCK = 64;  // outputs that one kernel call computes
constexpr int ROWS = 6;    // rows that share a read of the weights; their sums fill AVX-512's registers
constexpr int SPINS = 4000;

struct Product { const void* weights; const float* scales; const int32_t* sums; int64_t out, in; };
struct Layer { const bf16 *input_norm, *post_norm; Product query_key_value, output, gate_up, down; bf16 *keys, *values; };
struct Model {
  int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, capacity, threads;
  double eps, scale;
  const bf16 *embeddings, *final_norm;
  const float *cos, *sin;  // [capacity, head_dim]; sin carries the sign of rotate_half
  Product head;
  const Layer* layers;
};

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
static F exponential(F x) {  // of x <= 0, to 2e-7 of the result
  x = x < -87.f ? spread(-87.f) : x;
  F t = x * 1.44269504f;
  I n = __builtin_convertvector(t - 0.5f, I);  // truncated towards zero: the nearest below or equal
  F f = (x - __builtin_convertvector(n, F) * 0.693359375f) + __builtin_convertvector(n, F) * 2.12194440e-4f;
  F p = spread(1.9875691500e-4f) * f + 1.3981999507e-3f;
  p = ((p * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  return (p * f * f + f + 1.f) * (F)((n + 127) << 23);
}

// Products of R rows and one block. Rows are bfloat16 or unsigned bytes around 128.
template <int R> static void multiply(const bf16* rows, int64_t in, const bf16* weights, float out[][BLOCK]) {
  F sums[R][4] = {};
  for (int64_t k = 0; k < in / 2; k++, weights += 2 * BLOCK) {
    if (R == 1) for (int i = 0; i < 4; i++) __builtin_prefetch((const char*)weights + 2048 + 64 * i);
    for (int i = 0; i < 4; i++) {
      U pair = *(const U*)(weights + 32 * i);
      for (int r = 0; r < R; r++) {
        const uint32_t x = read32(rows + r * in + 2 * k);
#ifdef __AVX512BF16__
        sums[r][i] = (F)_mm512_dpbf16_ps((__m512)sums[r][i], (__m512bh)_mm512_set1_epi32(x), (__m512bh)pair);
#else
        sums[r][i] += (F)(pair << 16) * (F)(U{} + (x << 16)) + (F)(pair & 0xffff0000) * (F)(U{} + (x & 0xffff0000));
#endif
      }
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
template <int R = ROWS, class X, class W> static void multiply_rows(int count, const X* rows, int64_t in, const W* weights, float out[][BLOCK]) {
  if constexpr (R > 1)
    if (count < R) return multiply_rows<R - 1>(count, rows, in, weights, out);
  multiply<R>(rows, in, weights, out);
}

// Rows of a product's input, in the form that its weights want.
struct Input {
  std::unique_ptr<bf16[]> halves;
  std::unique_ptr<uint8_t[]> bytes;
  std::unique_ptr<float[]> scales;
  Input(int64_t rows, int64_t width) : halves(new bf16[rows * width]), bytes(new uint8_t[rows * width]), scales(new float[rows]) {}
  void put(const Product& product, int64_t row, const float* x) {
    const int64_t in = product.in;
    if (!product.scales) {
      for (int64_t k = 0; k < in; k += 16) narrow(&halves[row * in + k], load(x + k));
      return;
    }
    float largest = 1e-9f;
    for (int64_t k = 0; k < in; k++) largest = std::max(largest, std::fabs(x[k]));
    scales[row] = largest / 127.f;
    for (int64_t k = 0; k < in; k++) bytes[row * in + k] = (uint8_t)(std::nearbyint(x[k] * (127.f / largest)) + 128.f);
  }
};

// Compute the blocks of one thread and call take(row, first output, number of outputs, values).
template <class Take> static void compute(const Product& product, const Input& input, int64_t rows, int thread, int threads, Take take) {
  const int64_t blocks = (product.out + BLOCK - 1) / BLOCK, in = product.in;
  float out[ROWS][BLOCK];
  for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
    const int64_t first = block * BLOCK, count = std::min<int64_t>(BLOCK, product.out - first);
    for (int64_t row = 0; row < rows; row += ROWS) {
      const int together = (int)std::min<int64_t>(ROWS, rows - row);
      if (!product.scales) {
        multiply_rows(together, &input.halves[row * in], in, (const bf16*)product.weights + first * in, out);
      } else {
        multiply_rows(together, &input.bytes[row * in], in, (const int8_t*)product.weights + first * in, out);
        for (int r = 0; r < together; r++)
          for (int i = 0; i < BLOCK; i++)  // bytes are 128 too large, which the sums of the weights take back
            out[r][i] = (out[r][i] - 128.f * product.sums[first + i]) * product.scales[first + i] * input.scales[row + r];
      }
      for (int r = 0; r < together; r++) take(row + r, first, count, out[r]);
    }
  }
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

static void normalize(const float* x, const bf16* weight, int64_t size, float eps, float* out) {
  F squares = {};
  for (int64_t k = 0; k < size; k += 16) squares += load(x + k) * load(x + k);
  const float factor = 1.f / std::sqrt(total(squares) / size + eps);
  for (int64_t k = 0; k < size; k += 16) store(out + k, load(x + k) * factor * widen(weight + k));
}

static void rotate(const float* x, const float* cos, const float* sin, int64_t size, float* out) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i++) {
    out[i] = x[i] * cos[i] + x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i + half] + x[i] * sin[i + half];
  }
}

// Write one row's key and value of a key/value head and attend with its query heads. `projected` is the row's product.
static void attend(const Model& m, const Layer& layer, int64_t head, int64_t slot, int64_t position, const float* projected, float* scores, float* out) {
  const int64_t size = m.head_dim, groups = m.num_heads / m.num_kv_heads, length = position + 1;
  const float *cos = m.cos + position * size, *sin = m.sin + position * size;
  bf16* keys = layer.keys + (slot * m.num_kv_heads + head) * m.capacity * size;
  bf16* values = layer.values + (slot * m.num_kv_heads + head) * m.capacity * size;
  const float* value = projected + (m.num_heads + m.num_kv_heads + head) * size;
  float rotated[512];
  rotate(projected + (m.num_heads + head) * size, cos, sin, size, rotated);
  for (int64_t i = 0; i < size; i += 16) {
    narrow(keys + position * size + i, load(rotated + i));
    narrow(values + position * size + i, load(value + i));
  }
  for (int64_t group = 0; group < groups; group++) {
    rotate(projected + (head * groups + group) * size, cos, sin, size, rotated);
    float largest = -INFINITY;
    for (int64_t l = 0; l < length; l++) {
      F sum = {};
      for (int64_t i = 0; i < size; i += 16) sum += load(rotated + i) * widen(keys + l * size + i);
      scores[l] = total(sum) * (float)m.scale;
      largest = std::max(largest, scores[l]);
    }
    for (int64_t l = length; l % 16; l++) scores[l] = -INFINITY;
    F weights = {};
    for (int64_t l = 0; l < length; l += 16) {
      F weight = exponential(load(scores + l) - largest);
      store(scores + l, weight);
      weights += weight;
    }
    float* sums = out + (head * groups + group) * size;
    const float factor = 1.f / total(weights);
    for (int64_t i = 0; i < size; i += 64) {  // four vectors stay in registers
      F sum[4] = {};
      const int vectors = (int)std::min<int64_t>(4, (size - i) / 16);
      auto weigh = [&](int count) {
        for (int64_t l = 0; l < length; l++)
          for (int v = 0; v < count; v++) sum[v] += scores[l] * widen(values + l * size + i + 16 * v);
      };
      vectors == 4 ? weigh(4) : weigh(vectors);  // a constant count is unrolled
      for (int v = 0; v < vectors; v++) store(sums + i + 16 * v, sum[v] * factor);
    }
  }
}

extern "C" void step(const Model* model, int64_t rows, const int64_t* tokens, const int64_t* slots, const int64_t* positions, float* logits) {
  const Model& m = *model;
  const int64_t width = m.hidden_size, heads_size = m.num_heads * m.head_dim, projected_size = heads_size + 2 * m.num_kv_heads * m.head_dim;
  const int64_t inner = m.layers[0].down.in, gate_up = m.layers[0].gate_up.out / 2;
  std::unique_ptr<float[]> hidden(new float[rows * width]), projected(new float[rows * projected_size]);
  std::unique_ptr<float[]> attended(new float[rows * heads_size]), gates(new float[rows * 2 * inner]);
  for (int64_t i = 0; i < rows * width; i += 16) store(&hidden[i], widen(m.embeddings + tokens[i / width] * width + i % width));
  Barrier barrier;
#pragma omp parallel num_threads(m.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int phase = 0;
    const int64_t widest = std::max(std::max(width, inner), heads_size);
    Input input(rows, widest);
    std::unique_ptr<float[]> row(new float[widest]), scores(new float[m.capacity + 16]);
    auto normed = [&](const Product& product, const bf16* norm) {
      for (int64_t r = 0; r < rows; r++) {
        normalize(&hidden[r * width], norm, width, (float)m.eps, row.get());
        input.put(product, r, row.get());
      }
    };
    auto copy_to = [](float* target, int64_t size) {
      return [=](int64_t r, int64_t first, int64_t count, const float* out) { memcpy(target + r * size + first, out, count * sizeof(float)); };
    };
    auto add = [&](int64_t r, int64_t first, int64_t count, const float* out) {
      for (int64_t i = 0; i < count; i++) hidden[r * width + first + i] += out[i];
    };
    for (int64_t index = 0; index < m.num_layers; index++) {
      const Layer& layer = m.layers[index];
      normed(layer.query_key_value, layer.input_norm);
      compute(layer.query_key_value, input, rows, thread, threads, copy_to(projected.get(), projected_size));
      barrier.wait(phase, threads);
      const int64_t tasks = rows * m.num_kv_heads;
      for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; i++) {
        const int64_t r = i / m.num_kv_heads;
        attend(m, layer, i % m.num_kv_heads, slots[r], positions[r], &projected[r * projected_size], scores.get(), &attended[r * heads_size]);
      }
      barrier.wait(phase, threads);
      for (int64_t r = 0; r < rows; r++) input.put(layer.output, r, &attended[r * heads_size]);
      compute(layer.output, input, rows, thread, threads, add);
      barrier.wait(phase, threads);
      normed(layer.gate_up, layer.post_norm);
      compute(layer.gate_up, input, rows, thread, threads, copy_to(gates.get(), 2 * inner));
      barrier.wait(phase, threads);
      for (int64_t r = 0; r < rows; r++) {
        const float *gate = &gates[r * 2 * inner], *up = gate + gate_up;
        for (int64_t i = 0; i < inner; i += 16) {
          F x = load(gate + i), e = exponential(x < 0.f ? x : -x);  // silu(x) = x / (1 + exp(-x)), without overflow
          store(&row[i], x * (x < 0.f ? e : spread(1.f)) / (1.f + e) * load(up + i));
        }
        input.put(layer.down, r, row.get());
      }
      compute(layer.down, input, rows, thread, threads, add);
      barrier.wait(phase, threads);
    }
    normed(m.head, m.final_norm);
    compute(m.head, input, rows, thread, threads, copy_to(logits, m.head.out));
  }
}

// One product: bfloat16 rows [rows, in] to bfloat16 [rows, out].
extern "C" void multiply(const Product* product, int64_t threads, int64_t rows, const bf16* x, bf16* out) {
  Input input(rows, product->in);
  const int64_t in = product->in;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> row(new float[in]);
#pragma omp for
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t k = 0; k < in; k += 16) store(&row[k], widen(x + r * in + k));
      input.put(*product, r, row.get());
    }
    compute(*product, input, rows, omp_get_thread_num(), omp_get_num_threads(), [&](int64_t r, int64_t first, int64_t count, const float* values) {
      for (int64_t i = 0; i < count; i++) out[r * product->out + first + i] = (bf16)rounded(read32(values + i));
    });
  }
}

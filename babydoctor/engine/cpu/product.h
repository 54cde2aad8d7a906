// Products of a decoding step: rows times weights in bfloat16, int8 or NF4, and LoRAs beside them.
//
// Weights are read once per step, in blocks of 64 outputs:
//   bfloat16 [out/64][in/2][64][2].
//   int8     [out/64][in/4][64][4], with a scale and a sum for each output.
//   NF4      [out/64][in/8][64] words of eight codes, with a scale for 64 inputs of an output: [out/64][in/64][64]. The
//            codes of inputs 0, 2, 4, 6 are in the lower half of a word, lowest first, those of 1, 3, 5, 7 in the upper.
// Sums are float32. Vectors are the compiler's own, as long as the processor's, so this runs on AVX-512, AVX2 and NEON. Dot
// products and byte shuffles of x86 are used where they are. A row's result does not depend on the other rows.
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

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef uint16_t bf16;
typedef float F __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t U __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t H __attribute__((vector_size(2 * LANES), aligned(2)));
constexpr int BLOCK = 64;       // outputs that one kernel call computes
constexpr int ROWS = 6;         // rows that share a read of the weights
constexpr int NF4_INPUTS = 64;  // inputs that share a scale
template <int R> constexpr int SPAN = LANES == 16 ? BLOCK : R == 1 ? 32 : 16;  // outputs whose sums fit the registers
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
  typedef float F4 __attribute__((vector_size(16)));
  F4 parts[LANES / 4];
  memcpy(parts, &v, sizeof v);
  for (int n = LANES / 8; n; n /= 2) for (int i = 0; i < n; i++) parts[i] += parts[i + n];
  return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}
// The sums plus products of each output's pair of weights with one pair of inputs, all bfloat16.
static F add_pairs(F sums, U weights, uint32_t x) {
#ifdef __AVX512BF16__
  return (F)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(x), (__m512bh)weights);
#else
  return sums + (F)(weights << 16) * (F)(U{} + (x << 16)) + (F)(weights & 0xffff0000) * (F)(U{} + (x & 0xffff0000));
#endif
}

// The sums plus products of each output's four weights with four inputs.
static I add_fours(I sums, I weights, const uint8_t* x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return (I)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(read32(x)), (__m512i)weights);
#elif defined(__AVXVNNI__) && !defined(__AVX512BW__)
  return (I)_mm256_dpbusd_avx_epi32((__m256i)sums, _mm256_set1_epi32(read32(x)), (__m256i)weights);
#elif defined(__AVX2__) && !defined(__AVX512BW__)
  const __m256i inputs = _mm256_set1_epi32(read32(x)), first = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)weights, 8), 8);
  const __m256i even = _mm256_madd_epi16(first, _mm256_and_si256(inputs, _mm256_set1_epi16(255)));
  return sums + (I)even + (I)_mm256_madd_epi16(_mm256_srai_epi16((__m256i)weights, 8), _mm256_srli_epi16(inputs, 8));
#else
  return sums + (weights << 24 >> 24) * x[0] + (weights << 16 >> 24) * x[1] + (weights << 8 >> 24) * x[2] + (weights >> 24) * x[3];
#endif
}

// NF4's levels in bfloat16 (QLoRA, Dettmers et al. 2023).
alignas(64) constexpr bf16 LEVELS[32] = {
  0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80,
  0xbf80, 0xbf32, 0xbf06, 0xbeca, 0xbe92, 0xbe3d, 0xbdba, 0x0000, 0x3da3, 0x3e25, 0x3e7c, 0x3ead, 0x3ee2, 0x3f10, 0x3f39, 0x3f80};

// The levels of the lowest code in each half of the words.
static U look_up(U words) {
#if defined(__AVX512BW__)  // an index has five bits, so the table holds the levels twice
  return (U)_mm512_permutexvar_epi16((__m512i)words, _mm512_load_si512(LEVELS));
#elif defined(__AVX2__)  // the lower and the upper bytes of the levels; an index with its highest bit set gives 0
  const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(-128, 50, 6, -54, -110, 61, -70, 0, -93, 37, 124, -83, -30, 16, 57, -128));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(-65, -65, -65, -66, -66, -66, -67, 0, 61, 62, 62, 62, 62, 63, 63, 63));
  const __m256i codes = _mm256_and_si256((__m256i)words, _mm256_set1_epi16(15));
  const __m256i lower = _mm256_shuffle_epi8(low, _mm256_or_si256(codes, _mm256_set1_epi16((short)0x8000)));
  return (U)_mm256_or_si256(lower, _mm256_shuffle_epi8(high, _mm256_or_si256(_mm256_slli_epi16(codes, 8), _mm256_set1_epi16(0x80))));
#else
  U pairs;
  for (int i = 0; i < LANES; i++) pairs[i] = LEVELS[words[i] & 15] | (uint32_t)LEVELS[words[i] >> 16 & 15] << 16;
  return pairs;
#endif
}

// Products of R rows and one block. Rows are bfloat16 or unsigned bytes around 128.
template <int R> static void multiply(const bf16* rows, int64_t in, const bf16* block, float out[][BLOCK]) {
  for (int first = 0; first < BLOCK; first += SPAN<R>) {
    F sums[R][SPAN<R> / LANES] = {};
    const bf16* weights = block + 2 * first;
    for (int64_t k = 0; k < in / 2; k++, weights += 2 * BLOCK) {
      if (R == 1) for (int i = 0; i < SPAN<R>; i += 16) __builtin_prefetch(weights + 1024 + 2 * i);
      for (int i = 0; i < SPAN<R> / LANES; i++) {
        const U pair = *(const U*)(weights + 2 * LANES * i);
        for (int r = 0; r < R; r++) sums[r][i] = add_pairs(sums[r][i], pair, read32(rows + r * in + 2 * k));
      }
    }
    for (int r = 0; r < R; r++) for (int i = 0; i < SPAN<R> / LANES; i++) store(out[r] + first + LANES * i, sums[r][i]);
  }
}
template <int R> static void multiply(const uint8_t* rows, int64_t in, const int8_t* block, float out[][BLOCK]) {
  for (int first = 0; first < BLOCK; first += SPAN<R>) {
    I sums[R][SPAN<R> / LANES] = {};
    const int8_t* weights = block + 4 * first;
    for (int64_t k = 0; k < in / 4; k++, weights += 4 * BLOCK) {
      if (R == 1) for (int i = 0; i < SPAN<R>; i += 16) __builtin_prefetch(weights + 2048 + 4 * i);
      for (int i = 0; i < SPAN<R> / LANES; i++) {
        const I four = *(const I*)(weights + 4 * LANES * i);
        for (int r = 0; r < R; r++) sums[r][i] = add_fours(sums[r][i], four, rows + r * in + 4 * k);
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < SPAN<R> / LANES; i++) store(out[r] + first + LANES * i, __builtin_convertvector(sums[r][i], F));
  }
}
template <int R> static void multiply(const bf16* rows, int64_t in, const uint32_t* block, const float* scales, float out[][BLOCK]) {
  memset(out, 0, R * sizeof *out);
  for (int64_t begin = 0; begin < in; begin += NF4_INPUTS, scales += BLOCK) {
    for (int first = 0; first < BLOCK; first += SPAN<R>) {
      F sums[R][SPAN<R> / LANES] = {};
      const uint32_t* words = block + begin / 8 * BLOCK + first;
      for (int64_t k = begin; k < begin + NF4_INPUTS; k += 8, words += BLOCK) {
        if (R == 1) for (int i = 0; i < SPAN<R>; i += 16) __builtin_prefetch(words + 512 + i);
        for (int i = 0; i < SPAN<R> / LANES; i++) {
          U codes = *(const U*)(words + LANES * i);
          for (int j = 0; j < 4; j++, codes >>= 4) {
            const U pair = look_up(codes);
            for (int r = 0; r < R; r++) sums[r][i] = add_pairs(sums[r][i], pair, read32(rows + r * in + k + 2 * j));
          }
        }
      }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < SPAN<R> / LANES; i++) {
          float* sum = out[r] + first + LANES * i;
          store(sum, load(sum) + sums[r][i] * load(scales + first + LANES * i));
        }
    }
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
      for (int64_t k = 0; k < in; k += LANES) narrow(&halves[row * in + k], load(x + k));
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

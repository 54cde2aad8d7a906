// A decoding step of a LLaMA on the CPU in one parallel region. Keys and values are bfloat16, in the KV cache's own slots.
#include "product.h"

struct Layer { const bf16 *input_norm, *post_norm; Product query_key_value, output, gate_up, down; bf16 *keys, *values; };
struct Model {
  int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, capacity, threads;
  int64_t rank;  // the largest of the LoRAs'
  double eps, scale;
  const bf16 *embeddings, *final_norm;
  const float *cos, *sin;  // [capacity, head_dim]; sin carries the sign of rotate_half
  Product head;
  const Layer* layers;
};

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

static void normalize(const float* x, const bf16* weight, int64_t size, float eps, float* out) {
  F squares = {};
  for (int64_t k = 0; k < size; k += LANES) squares += load(x + k) * load(x + k);
  const float factor = 1.f / std::sqrt(total(squares) / size + eps);
  for (int64_t k = 0; k < size; k += LANES) store(out + k, load(x + k) * factor * widen(weight + k));
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
  for (int64_t i = 0; i < size; i += LANES) {
    narrow(keys + position * size + i, load(rotated + i));
    narrow(values + position * size + i, load(value + i));
  }
  for (int64_t group = 0; group < groups; group++) {
    rotate(projected + (head * groups + group) * size, cos, sin, size, rotated);
    float largest = -INFINITY;
    for (int64_t l = 0; l < length; l++) {
      F sum = {};
      for (int64_t i = 0; i < size; i += LANES) sum += load(rotated + i) * widen(keys + l * size + i);
      scores[l] = total(sum) * (float)m.scale;
      largest = std::max(largest, scores[l]);
    }
    for (int64_t l = length; l % LANES; l++) scores[l] = -INFINITY;
    F weights = {};
    for (int64_t l = 0; l < length; l += LANES) {
      F weight = exponential(load(scores + l) - largest);
      store(scores + l, weight);
      weights += weight;
    }
    float* sums = out + (head * groups + group) * size;
    const float factor = 1.f / total(weights);
    for (int64_t i = 0; i < size; i += 4 * LANES) {  // four vectors stay in registers
      F sum[4] = {};
      const int vectors = (int)std::min<int64_t>(4, (size - i) / LANES);
      auto weigh = [&](int count) {
        for (int64_t l = 0; l < length; l++)
          for (int v = 0; v < count; v++) sum[v] += scores[l] * widen(values + l * size + i + LANES * v);
      };
      vectors == 4 ? weigh(4) : weigh(vectors);  // a constant count is unrolled
      for (int v = 0; v < vectors; v++) store(sums + i + LANES * v, sum[v] * factor);
    }
  }
}

extern "C" void step(const Model* model, int64_t rows, const int64_t* tokens, const int64_t* slots, const int64_t* positions, float* logits) {
  const Model& m = *model;
  const int64_t width = m.hidden_size, heads_size = m.num_heads * m.head_dim, projected_size = heads_size + 2 * m.num_kv_heads * m.head_dim;
  const int64_t inner = m.layers[0].down.in, gate_up = m.layers[0].gate_up.out / 2;
  std::unique_ptr<float[]> hidden(new float[rows * width]), projected(new float[rows * projected_size]);
  std::unique_ptr<float[]> attended(new float[rows * heads_size]), gates(new float[rows * 2 * inner]), lows(new float[rows * m.rank]);
  for (int64_t i = 0; i < rows * width; i += LANES) store(&hidden[i], widen(m.embeddings + tokens[i / width] * width + i % width));
  Barrier barrier;
#pragma omp parallel num_threads(m.threads)
  {
    const int64_t widest = std::max(std::max(width, inner), heads_size);
    Input input(rows, widest);
    Worker worker(rows, barrier, input, lows.get(), m.rank);
    const int thread = worker.thread, threads = worker.threads;
    std::unique_ptr<float[]> row(new float[widest]), scores(new float[m.capacity + LANES]);
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
      worker.compute(layer.query_key_value, copy_to(projected.get(), projected_size));
      const int64_t tasks = rows * m.num_kv_heads;
      for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; i++) {
        const int64_t r = i / m.num_kv_heads;
        attend(m, layer, i % m.num_kv_heads, slots[r], positions[r], &projected[r * projected_size], scores.get(), &attended[r * heads_size]);
      }
      worker.wait();
      for (int64_t r = 0; r < rows; r++) input.put(layer.output, r, &attended[r * heads_size]);
      worker.compute(layer.output, add);
      normed(layer.gate_up, layer.post_norm);
      worker.compute(layer.gate_up, copy_to(gates.get(), 2 * inner));
      for (int64_t r = 0; r < rows; r++) {
        const float *gate = &gates[r * 2 * inner], *up = gate + gate_up;
        for (int64_t i = 0; i < inner; i += LANES) {
          F x = load(gate + i), e = exponential(x < 0.f ? x : -x);  // silu(x) = x / (1 + exp(-x)), without overflow
          store(&row[i], x * (x < 0.f ? e : spread(1.f)) / (1.f + e) * load(up + i));
        }
        input.put(layer.down, r, row.get());
      }
      worker.compute(layer.down, add);
    }
    normed(m.head, m.final_norm);
    worker.compute(m.head, copy_to(logits, m.head.out));
  }
}

// One product: bfloat16 rows [rows, in] to bfloat16 [rows, out].
extern "C" void multiply(const Product* product, int64_t threads, int64_t rows, const bf16* x, bf16* out) {
  const int64_t in = product->in, rank = product->down ? product->down->out : 0;
  std::unique_ptr<float[]> lows(new float[rows * rank]);
  Input input(rows, in);
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<float[]> row(new float[in]);
#pragma omp for
    for (int64_t r = 0; r < rows; r++) {
      for (int64_t k = 0; k < in; k += LANES) store(&row[k], widen(x + r * in + k));
      input.put(*product, r, row.get());
    }
    Worker worker(rows, barrier, input, lows.get(), rank);
    worker.compute(*product, [&](int64_t r, int64_t first, int64_t count, const float* values) {
      for (int64_t i = 0; i < count; i++) out[r * product->out + first + i] = (bf16)rounded(read32(values + i));
    });
  }
}

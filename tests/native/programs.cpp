// Programs against plain loops in double, for processors on which Python is not at hand:
// scripts/arm.sh runs this under an emulator. Exit status 1 where one differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "dispatch.h"
#include "program.h"

using namespace sparseworks;

namespace {

using Numbers = std::vector<float>;
constexpr int kInputs = 44, kOutputs = 37;

std::mt19937 random_bits(7);

Numbers random_numbers(size_t count) {
  std::normal_distribution<float> normal;
  Numbers found(count);
  for (float& x : found) x = normal(random_bits);
  return found;
}

Geometry tokens(int count) {
  Geometry g;
  g.width = count;
  g.pitch = g.plane = (count + 15) / 16 * 16;
  return g;
}

float rounded_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Words of `size` weights each, and where they are: what a row keeps of its inputs.
struct Kept {
  std::vector<int64_t> start{0};
  std::vector<uint16_t> column;
  Numbers value;
};

template <typename Word>
Kept kept(const Numbers& weight, int size, const Word& word) {
  Kept k;
  for (int r = 0; r < kOutputs; ++r) {
    for (int c = 0; c < kInputs / size; ++c) {
      const float* w = weight.data() + r * kInputs + c * size;
      bool any = false;
      for (int i = 0; i < size; ++i) any = any || w[i] != 0;
      if (!any) continue;
      k.column.push_back(static_cast<uint16_t>(c));
      k.value.push_back(word(r, w));
    }
    k.start.push_back(static_cast<int64_t>(k.value.size()));
  }
  return k;
}

float pair_of(int, const float* w) {
  uint32_t bits[2];
  for (int i = 0; i < 2; ++i) {
    const float half = rounded_to_half(w[i]);
    std::memcpy(&bits[i], &half, sizeof half);
  }
  const uint32_t both = bits[0] >> 16 | bits[1];
  float out;
  std::memcpy(&out, &both, sizeof out);
  return out;
}

struct Made {
  std::vector<Op> ops;
  std::vector<int64_t> where;
  int64_t size = 0;

  int buffer(int64_t floats) {
    where.push_back(size);
    size += (floats + 15) / 16 * 16;
    return static_cast<int>(where.size()) - 1;
  }
  Op& add(Kind kind, int in, int out, int channels, const Geometry& g) {
    Op op{};
    op.kind = kind;
    op.in = in;
    op.out = out;
    op.channels = channels;
    op.from = op.to = g;
    op.layout = Layout::kTokens;
    op.window = 1;
    op.apart = 0;
    ops.push_back(op);
    return ops.back();
  }
  Numbers run(const Numbers& x, int64_t outputs) {
    Arena arena;
    Program program(where, size, 1, &arena);
    for (Op& op : ops) program.add(op);
    Numbers y(static_cast<size_t>(outputs));
    Numbers given = x;
    program.run({{given.data(), 1, static_cast<int64_t>(x.size())}, {y.data(), 1, outputs}}, 1, 1);
    return y;
  }
};

int failures = 0;

void compare(const char* name, int count, const Numbers& found, const std::vector<double>& wanted,
             double tolerance) {
  double most = 0, scale = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    most = std::max(most, std::fabs(found[i] - wanted[i]));
    scale = std::max(scale, std::fabs(wanted[i]));
  }
  const bool right = most <= tolerance * scale;
  if (!right) ++failures;
  std::printf("%s, %d tokens: %.1e of the largest%s\n", name, count, most / scale,
              right ? "" : "  WRONG");
}

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }

void products(int count, int word) {
  const Geometry g = tokens(count);
  Numbers x = random_numbers(static_cast<size_t>(count) * kInputs);
  Numbers weight = random_numbers(kInputs * kOutputs), bias = random_numbers(kOutputs);
  for (float& w : weight) w = std::fabs(w) > 1 ? w : 0;
  Numbers scale(kOutputs);
  std::vector<int32_t> zero(kOutputs);
  std::vector<double> rounded(weight.begin(), weight.end());
  for (int r = 0; r < kOutputs; ++r) {
    float most = 0;
    for (int c = 0; c < kInputs; ++c) most = std::max(most, std::fabs(weight[r * kInputs + c]));
    scale[r] = most / 127 / 127;
    for (int c = 0; c < kInputs; ++c) {
      const float w = weight[r * kInputs + c];
      const auto whole = static_cast<int>(std::nearbyint(w / (most / 127)));
      zero[r] -= 128 * whole;
      if (word == 4) rounded[r * kInputs + c] = whole * (most / 127.0);
      if (word == 2) rounded[r * kInputs + c] = rounded_to_half(w);
    }
  }
  const auto four_of = [&](int r, const float* w) {
    int8_t four[4];
    for (int i = 0; i < 4; ++i) four[i] = static_cast<int8_t>(std::nearbyint(w[i] / (scale[r] * 127)));
    float out;
    std::memcpy(&out, four, sizeof out);
    return out;
  };
  const auto itself = [](int, const float* w) { return *w; };
  const Kept k = word == 1 ? kept(weight, 1, itself) : word == 2 ? kept(weight, 2, pair_of)
                                                                  : kept(weight, 4, four_of);
  Made m;
  const int in = m.buffer(kInputs * g.plane), words = m.buffer(kInputs * g.plane);
  const int out = m.buffer(kOutputs * g.plane), range = m.buffer(g.plane);
  m.add(Kind::kLoad, -1, in, kInputs, g).tensor = 0;
  if (word == 2) m.add(Kind::kPairs, in, words, kInputs, g);
  if (word == 4) {
    m.add(Kind::kRange, in, range, kInputs, g);
    m.add(Kind::kQuads, in, words, kInputs, g).extra = range;
  }
  Op& op = m.add(Kind::kProduct, word == 1 ? in : words, out, kOutputs, g);
  op.taps.rows = kOutputs;
  op.taps.channels = word;
  op.taps.start = k.start.data();
  op.taps.column = k.column.data();
  op.taps.value = k.value.data();
  op.taps.width = op.taps.columns = kInputs / word;
  op.taps.step = g.plane;
  op.bias = bias.data();
  op.activation = Activation::kGelu;
  if (word == 4) {
    op.taps.zero = zero.data();
    op.scale = scale.data();
    op.extra = range;
  }
  m.add(Kind::kStore, out, -1, kOutputs, g).tensor = 1;
  std::vector<double> wanted(static_cast<size_t>(count) * kOutputs);
  for (int t = 0; t < count; ++t) {
    const float* row = x.data() + t * kInputs;
    float most = 0;
    for (int c = 0; c < kInputs; ++c) most = std::max(most, std::fabs(row[c]));
    for (int r = 0; r < kOutputs; ++r) {
      double sum = bias[r];
      for (int c = 0; c < kInputs; ++c) {
        double v = word == 2 ? rounded_to_half(row[c]) : row[c];
        if (word == 4) v = std::nearbyint(row[c] * (127.0f / most)) * (most / 127.0);
        sum += rounded[r * kInputs + c] * v;
      }
      wanted[t * kOutputs + r] = gelu(sum);
    }
  }
  const char* names[] = {"", "product, fp32", "product, bf16", "", "product, int8"};
  compare(names[word], count, m.run(x, count * kOutputs), wanted, word == 4 ? 1e-5 : 2e-6);
}

void attention_after_norm(int count) {
  constexpr int heads = 2, size = 12, width = heads * size;
  const Geometry g = tokens(count);
  const Numbers x = random_numbers(static_cast<size_t>(count) * width);
  const Numbers gamma = random_numbers(width), beta = random_numbers(width);
  Made m;
  const int in = m.buffer(width * g.plane), normed = m.buffer(width * g.plane);
  const int out = m.buffer(width * g.plane);
  m.add(Kind::kLoad, -1, in, width, g).tensor = 0;
  Op& norm = m.add(Kind::kNorm, in, normed, width, g);
  norm.number = 1e-5f;
  norm.scale = gamma.data();
  norm.bias = beta.data();
  Op& op = m.add(Kind::kAttention, normed, out, width, g);
  op.other = op.extra = normed;
  op.heads = op.groups = heads;
  op.window = size;
  op.keys = count;
  op.number = 0.25f;
  m.add(Kind::kStore, out, -1, width, g).tensor = 1;
  std::vector<double> h(x.size()), wanted(x.size());
  for (int t = 0; t < count; ++t) {
    double mean = 0, square = 0;
    for (int c = 0; c < width; ++c) mean += x[t * width + c] / double(width);
    for (int c = 0; c < width; ++c) square += std::pow(x[t * width + c] - mean, 2) / width;
    for (int c = 0; c < width; ++c)
      h[t * width + c] = (x[t * width + c] - mean) / std::sqrt(square + 1e-5) * gamma[c] + beta[c];
  }
  for (int head = 0; head < heads; ++head)
    for (int q = 0; q < count; ++q) {
      const double* query = h.data() + q * width + head * size;
      std::vector<double> weight(count);
      double sum = 0;
      for (int k = 0; k < count; ++k) {
        double score = 0;
        for (int c = 0; c < size; ++c) score += query[c] * h[k * width + head * size + c];
        sum += weight[k] = std::exp(0.25 * score);
      }
      for (int c = 0; c < size; ++c)
        for (int k = 0; k < count; ++k)
          wanted[q * width + head * size + c] += weight[k] / sum * h[k * width + head * size + c];
    }
  compare("norm and attention", count, m.run(x, count * width), wanted, 2e-5);
}

}  // namespace

int main() {
  std::printf("%s\n", instruction_set().c_str());
  for (const int count : {1, 15, 16, 33, 97, 130}) {
    for (const int word : {1, 2, 4}) products(count, word);
    attention_after_norm(count);
  }
  return failures == 0 ? 0 : 1;
}

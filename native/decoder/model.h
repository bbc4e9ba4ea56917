// A language model as one program: what a step of the decoder does, without the weights' memory.
#pragma once

#include <cstdint>
#include <vector>

#include "../program.h"
#include "matrix.h"

namespace sparseworks {

// Which inputs of a matrix count; the others are taken as 0. Those with |x| weight > threshold, and
// of them the `keep` largest, where it is not 0.
struct Active {
  float threshold = -1;  // below 0: all
  int keep = 0;
  const float* weight = nullptr;  // [columns]; none: 1
  bool some() const { return threshold >= 0 || keep > 0; }
};

struct Linear {
  Matrix weight;
  const float* bias = nullptr;
  Active active;
};

enum class NormKind : int { kNone, kRms, kLayer };

struct Norm {
  NormKind kind = NormKind::kNone;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float eps = 0;
};

// cos and sin for each position: [positions][dims], the first half cosines. Column i turns with
// i + dims / 2.
struct Rotary {
  const float* table = nullptr;
  int dims = 0;
  int positions = 0;
};

struct Attention {
  Linear qkv;  // rows: heads, then keys, then values
  Linear out;
  Norm query_norm, key_norm;  // over a head
  int heads = 0, kv_heads = 0, size = 0;
  float scale = 1, softcap = 0;
  int window = 0;   // positions that are seen, this one included; 0: all
  int rotary = -1;  // which table
};

struct Mlp {
  Linear up;  // gated: panels of 16 gates, then of the 16 values they belong to
  Linear down;
  bool gated = false;
  Activation activation = Activation::kNone;
};

struct Mixture {
  Linear router;          // a row an expert, and one more for the gate of the shared expert
  std::vector<Mlp> experts;  // the last one is shared where `shared`
  int chosen = 0;         // 0: no mixture
  bool shared = false;
  bool normalized = false;  // weights of the chosen add up to 1
  int count() const { return static_cast<int>(experts.size()) - shared; }
};

struct Layer {
  Norm before_attention, after_attention, before_mlp, after_mlp;
  Attention attention;
  Mlp mlp;
  Mixture mixture;
  bool parallel = false;  // the MLP reads what attention reads
  float residual = 1;     // what both are multiplied with before they are added
};

struct Table {  // rows of fp32, bf16 or fp16
  const void* data = nullptr;
  int rows = 0;
  int kind = 0;  // 0 fp32, 1 bf16, 2 fp16
};

struct Model {
  int width = 0;
  Table embedding, positions;
  int position_offset = 0;
  float embedding_scale = 1;
  Norm embedding_norm, final_norm;
  std::vector<Rotary> rotary;
  std::vector<Layer> layers;
  Linear head;
  float logit_softcap = 0, logit_scale = 1;
};

enum class CacheKind : int { kFloat, kHalf, kInt8 };

// Keys [texts][kv heads][capacity / 16][padded size][16], values [texts][kv heads][capacity][padded
// size] of each layer, with a scale for each position where they are int8.
struct CacheLayer {
  void* key;
  void* value;
  float* key_scale;
  float* value_scale;
};

struct Cache {
  CacheKind kind = CacheKind::kHalf;
  int texts = 0;
  int capacity = 0;  // a multiple of 16
  std::vector<CacheLayer> layers;
};

// Tokens of one step, those of a text side by side and in order.
struct Step {
  int tokens = 0;
  const int32_t* token = nullptr;
  const int32_t* text = nullptr;
  const int32_t* position = nullptr;
  int wanted = 0;  // for which logits are asked
  const int32_t* want = nullptr;
  float* logits = nullptr;  // [wanted][vocabulary]
  int threads = 1;
};

// Memory that one caller keeps between steps.
struct Workspace {
  std::vector<std::vector<uint8_t>> memory;
};

struct DecoderKernels {
  void (*step)(const Model&, const Cache&, const Step&, Workspace&);
  // y [tokens, rows] = x [tokens, columns] W^T
  void (*product)(const Matrix& w, const float* x, int tokens, float* y, int threads);
  // Seconds of one vector on one thread, with the matrix in the caches it fits: least of `repeats`.
  double (*time)(const Matrix& w, int repeats);
  // Reads memory as fast as it can, and gives the sum of what it read as floats.
  float (*read)(const float* p, int64_t count, int threads);
};

extern const DecoderKernels decoder_base, decoder_avx2, decoder_vbmi2, decoder_bf16, decoder_amx;

}  // namespace sparseworks

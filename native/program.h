// A whole model as one list of operations that runs in one call.
//
// Activations are channel-major, [channel][position]: positions are the tokens of one sequence, the
// pixels of one image (lanes = 1), or the pixels of 16 images at once (lanes = 16, [pixel][image]).
// An image has `pad` zero pixels on its left, shared with the right end of the row before, and `pad`
// zero rows above and below, so that a tap of a convolution is a constant offset. Where rows of
// pixels fill whole vectors there are no such pixels; copies shifted by a pixel to either side take
// their place, so that all loads are aligned.
//
// The batch is cut into items (a sequence, an image, 16 images) that do not depend on each other.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sparseworks {

enum class Activation : int {
  kNone, kRelu, kRelu6, kGelu, kGeluTanh, kSilu, kHardswish, kHardsigmoid, kSigmoid, kTanh, kLeakyRelu,
  kQuickGelu, kElu, kMish
};

enum class Kind : int {
  kLoad,       // an input tensor -> buffer
  kStore,      // buffer -> an output tensor
  kProduct,    // sparse linear map with taps, bias, residual and activation
  kPool,       // max or average over windows
  kMean,       // average over all positions
  kCombine,    // sum or product of two buffers, or an activation alone
  kPhases,     // the input of a strided convolution, one plane per phase
  kNorm,       // layer norm over channels, or by their root mean square alone
  kAttention,  // softmax(q k^T scale + mask + bias) v, in windows of positions
  kShift,      // the shifted copies of what is in `out`
  kPairs,      // channels two by two, as pairs of bf16
  kGather,     // some channels of a buffer -> some channels of another one
  kUpsample,   // every pixel several times
  kRange,      // largest magnitudes, by which int8 is scaled
  kQuads,      // channels four by four, as int8 moved by 128
  kMove,       // positions of a buffer -> positions of another one, or weighted sums of them
  kGroupNorm,  // norm over the pixels of groups of channels
};

// All strides in floats. A band of a value is [copy][channel][plane], with its share of the rows and
// padding above and below.
struct Geometry {
  int height = 1, width = 1, pad = 0, lanes = 1;
  int64_t pitch = 0, plane = 0, origin = 0;
  int bands = 1;

  int rows() const { return height / bands; }  // of a band
};

// The rows of a linear map in groups that share their taps. The taps come in blocks of inputs that
// are read together; in a block, groups of equally many taps follow each other. All but the last
// three is the same in programs of all sizes.
struct Taps {
  static constexpr int kTogether = 1024;  // groups whose sums stay in the second cache; whole chunks
  int rows = 0, group = 1, blocks = 1;
  int channels = 1;                 // of a value: 1 in fp32, 2 in bf16, 4 in int8
  int chunk = 1;                    // groups within which `order` changes places
  const int64_t* start = nullptr;   // [blocks * groups + 1], in taps, by places
  const int32_t* order = nullptr;   // [blocks][groups], the group at each place; null: as they are
  const uint16_t* column = nullptr; // of each tap: place in the kernel + size of it * input of the block
  const float* value = nullptr;     // [tap][group]
  const int32_t* zero = nullptr;    // int8: [rows], -128 times the sum of a row's weights
  int64_t width = 0;                // columns of a block
  int64_t columns = 0;              // of all blocks, as far as there are taps
  // of each tap from the position's own address, in floats; null: where a column begins is `near`
  // beyond the position and `step` beyond the column before
  const int32_t* offset = nullptr;
  int64_t near = 0, step = 0;
};

// Where positions come from: out[to[i]] = sum over t of weight[i][t] in[from[i][t]], in floats from the
// beginning of a plane.
struct Moves {
  int count = 0, taps = 1;
  const int32_t* to = nullptr;
  const int32_t* from = nullptr;
  const float* weight = nullptr;  // null: one tap, as it is
};

// Of a caller's tensor: images [items, channels, height, width], tokens [items, tokens, channels], or
// one matrix [channels, positions], whose items are runs of positions.
enum class Layout { kImages, kTokens, kColumns };

struct Op {
  Kind kind;
  int out = -1, in = -1, other = -1, extra = -1;  // buffers
  int tensor = -1;                                // of kLoad and kStore
  Layout layout = Layout::kImages;                // of that tensor
  int channels = 0;                               // of out
  int stride = 1;
  bool flat = false;  // kProduct: all rows of pixels as one run (equal pitches, lanes = 1)
  Geometry from, to;
  int64_t apart = 0;           // floats from a band of any value to the next one
  int planes = 0, copies = 0;  // kProduct, of a band of `in`; copies are 0 where no other band is read
  Taps taps;
  Moves moves;                      // kMove
  const float* bias = nullptr;      // kProduct: [rows]; kNorm, kGroupNorm: beta
  const float* scale = nullptr;     // kNorm, kGroupNorm: gamma; kProduct in int8: [rows]
  Activation activation = Activation::kNone;
  float number = 0.0f;  // epsilon, the scale of attention, the slope of a leaky ReLU
  int window = 0, padding = 0;      // kPool; kPhases: the padding of its convolution; kUpsample
  // kPool: max; kCombine: product; kAttention: causal; kNorm: without mean; kMove: zeros elsewhere
  bool flag = false;
  bool broadcast = false;           // kCombine: `other` has one position; kPool: count pads
  int heads = 0, groups = 0;        // query heads, key heads; kGroupNorm: groups
  int q = 0, k = 0, v = 0;  // first channels in `in`, `other`, `extra`; kGather, kMove: `in`, `out`
  int q_step = 1, k_step = 1;       // kMove: channels from one to the next in `in` and `out`
  // kAttention: an input tensor, [items (windows) or 1, keys (, queries)]; empty: none
  int mask = -1;
  int added = -1;   // kAttention: an input tensor, [items or 1, heads, queries, keys]; empty: none
  int windows = 1;  // kAttention: equal runs of positions that see themselves alone
  int keys = 0;  // of a window
  int slots = 0;  // of an image's range, which is `extra` of its readers; 0: of tokens
  int64_t shift = 0;  // floats to the copy shifted right, twice as many to the one left; 0: none
  std::vector<uint16_t> live;       // per vector of a run: which lanes are not padding
  std::vector<int32_t> offset;      // of taps
  int parts = 1;                    // pieces when threads share one item
};

struct Tensor {
  float* data;
  int64_t items;  // size of its first dimension; 1 is shared by all
  int64_t size;   // floats of one entry of the first dimension
};

// One call: the tensors and how many entries (images, sequences) they hold.
struct Call {
  const Tensor* tensors;
  int64_t entries;
  int lanes;
};

// Piece `part` of `parts` of an operation on one item.
using RunOp = void (*)(const Op& op, const int64_t* where, float* arena, const Call& call,
                       int64_t item, int part, int parts);

void run_op_base(const Op&, const int64_t*, float*, const Call&, int64_t, int, int);
void run_op_avx2(const Op&, const int64_t*, float*, const Call&, int64_t, int, int);
void run_op_vnni(const Op&, const int64_t*, float*, const Call&, int64_t, int, int);
void run_op_bf16(const Op&, const int64_t*, float*, const Call&, int64_t, int, int);
void run_op_avx512(const Op&, const int64_t*, float*, const Call&, int64_t, int, int);

// Working memory, which programs of all sizes share. What is taken holds anything: whatever was left.
class Arena {
 public:
  Arena();
  ~Arena();
  class Memory;
  Memory take(int64_t floats);
  int64_t bytes() const;  // that calls in flight have or that wait for the next

 private:
  struct Blocks;
  std::unique_ptr<Blocks> blocks_;
};

class Program {
 public:
  // `arena` outlives the program.
  Program(std::vector<int64_t> where, int64_t size, int lanes, Arena* arena);
  void add(Op op);
  // Safe to call from several threads at once.
  void run(const std::vector<Tensor>& tensors, int64_t entries, int threads) const;
  // Seconds that each operation takes on the first item, on one thread: least of `repeats`.
  std::vector<double> profile(const std::vector<Tensor>& tensors, int64_t entries,
                              int repeats) const;
  const std::vector<Op>& ops() const { return ops_; }
  int64_t bytes() const;  // of the program itself

 private:
  void together(const Call& call, int64_t item, float* arena, RunOp run, int threads) const;
  std::vector<int64_t> where_;
  int64_t size_;
  int lanes_;
  std::vector<Op> ops_;
  Arena* arena_;
};

}  // namespace sparseworks

// Every operation of a program, compiled once per instruction set under the name RUN_OP.
#include "attention_impl.h"
#include "image_impl.h"
#include "quantize_impl.h"

namespace sparseworks {

void RUN_OP(const Op& op, const int64_t* where, float* arena, const Call& call, int64_t item,
            int part, int parts) {
  switch (op.kind) {
    case Kind::kLoad: return load_tensor(op, where, arena, call, item, part, parts);
    case Kind::kStore: return store_tensor(op, where, arena, call, item, part, parts);
    case Kind::kProduct: return product(op, where, arena, part, parts);
    case Kind::kPool: return pool(op, where, arena, part, parts);
    case Kind::kMean: return mean(op, where, arena, part, parts);
    case Kind::kCombine: return combine(op, where, arena, part, parts);
    case Kind::kPhases: return phases(op, where, arena, part, parts);
    case Kind::kNorm: return norm(op, where, arena, part, parts);
    case Kind::kShift: return shifted(op, where, arena, part, parts);
    case Kind::kPairs: return pairs(op, where, arena, part, parts);
    case Kind::kGather: return gather(op, where, arena, part, parts);
    case Kind::kUpsample: return upsample(op, where, arena, part, parts);
    case Kind::kRange: return range(op, where, arena, part, parts);
    case Kind::kQuads: return quads(op, where, arena, part, parts);
    case Kind::kMove: return move(op, where, arena, part, parts);
    case Kind::kGroupNorm: return group_norm(op, where, arena, part, parts);
    case Kind::kAttention: return attention(op, where, arena, call, item, part, parts);
  }
}

}  // namespace sparseworks

// A small thread pool of our own. The caller works too; idle workers spin briefly, then sleep.
#pragma once

#include <functional>

namespace sparseworks {

// Calls work(0), ..., work(items - 1), each once, on at most `threads` threads. Callers may overlap.
void parallel_for(int items, int threads, const std::function<void(int)>& work);

}  // namespace sparseworks

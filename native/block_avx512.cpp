#define BLOCK_NAME block_avx512
#include "block_impl.h"

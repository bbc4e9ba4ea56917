#define BLOCK_NAME block_avx2
#include "block_impl.h"

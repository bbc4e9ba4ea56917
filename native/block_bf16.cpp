#define BLOCK_NAME block_bf16
#include "block_impl.h"

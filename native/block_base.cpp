#define BLOCK_NAME block_base
#include "block_impl.h"

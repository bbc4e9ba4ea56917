#define KEEP_ONLY_NAME keep_only_avx512
#include "zeroing_impl.h"

#define KEEP_ONLY_NAME keep_only_avx2
#include "zeroing_impl.h"

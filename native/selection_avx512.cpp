#define KEEP_LARGEST_NAME keep_largest_avx512
#include "selection_impl.h"

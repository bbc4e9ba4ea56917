#define DECODER decoder_avx2
#include "step_impl.h"

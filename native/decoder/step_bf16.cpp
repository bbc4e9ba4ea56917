#define DECODER decoder_bf16
#include "step_impl.h"

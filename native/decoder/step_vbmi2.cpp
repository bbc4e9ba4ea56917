#define DECODER decoder_vbmi2
#include "step_impl.h"

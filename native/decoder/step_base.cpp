#define DECODER decoder_base
#include "step_impl.h"

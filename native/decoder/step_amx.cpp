#define DECODER decoder_amx
#include "step_impl.h"

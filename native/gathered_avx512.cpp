#define GATHERED_NAME gathered_avx512
#include "gathered_impl.h"

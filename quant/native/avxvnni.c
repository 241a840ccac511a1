/* AVX2 with the 256-bit dot products of AVX-VNNI. */
#define WITH_VNNI
#define LAST_FIRST 1
#include "vec256.h"

const kern_isa kern_avxvnni = KERNELS("avxvnni");

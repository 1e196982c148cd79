// The instruction set that this object file is compiled for. build.py compiles every op once per level and says which
// by KVRUN_LEVEL; run time picks a level by cpuid (runtime/isa.cpp).
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Everything below include/ that holds code sits in unnamed namespaces: were it shared between object files, the
// linker could keep the AVX-512 copy of a function and an AVX2 machine would run it.
namespace kvrun {
namespace {

struct Generic {
  static constexpr int lanes = 4;
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
};

struct Avx2 {
  static constexpr int lanes = 8;
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(32)));
};

struct Avx512 {
  static constexpr int lanes = 16;
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(64)));
};

#if defined(__AVX512F__)
using Isa = Avx512;
#elif defined(__AVX2__)
using Isa = Avx2;
#else
using Isa = Generic;
#endif

}  // namespace
}  // namespace kvrun

#define KVRUN_JOIN_(a, b, c) a##b##_##c
#define KVRUN_JOIN(a, b, c) KVRUN_JOIN_(a, b, c)

// Defines the C entry point of an op at this level, e.g. kvrun_rms_norm_avx2.
#define KVRUN_OP(name) extern "C" __attribute__((visibility("default"))) void KVRUN_JOIN(kvrun_, name, KVRUN_LEVEL)

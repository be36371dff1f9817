// What cpu_gemm.cpp offers to cpu_operator.cpp and, by way of it, to cpu.py.

#pragma once

#include "cpu_vectors.h"

struct Matrix {  // cpu.py's _Matrix, field for field
    const uint8_t* codes;
    int64_t rows, columns, row_stride, column_stride;
    const Target* format;
};

// What a GEMM can compute with, from the slowest; the numbers are places in cpu.py's ENGINES.
enum Engine : int { FLOATS, PAIRS, TILES };

bool can_use(Engine engine);
Engine fastest_engine();

// out[a.rows][b.columns] = a @ b / (scale_a * scale_b), in bf16 if `narrow`, else in float32. May throw std::bad_alloc.
void scaled_mm(const Matrix& a, const Matrix& b, float scale_a, float scale_b, void* out, bool narrow, Engine engine,
               int threads);

// The GEMM as cpu.py calls it, and as torch's dispatcher does: torch.ops.fp8core.scaled_mm without Python on the way.
//
// A call through Python costs several microseconds before anything is multiplied, as much as a small product. torch
// takes an operation's body as a C function on a stack of 64-bit words: its stable interface, of which cpu.py looks up
// the functions below in the libtorch that the process has loaded. Nothing is compiled or linked against torch.

#include "cpu_gemm.h"

#include <atomic>
#include <new>
#include <stdexcept>
#include <string>

namespace {

// torch's side of the interface; a result other than 0 is a failure that it has logged.
typedef void* TensorHandle;   // owned, where it is on a stack
typedef uint64_t StackWord;   // a handle, or a number
typedef void (*StackFunction)(StackWord* stack, uint64_t inputs, uint64_t outputs);

struct Torch {  // cpu.py's _Torch, field for field
    int (*library_init_impl)(const char* library, const char* dispatch_key, const char* file, uint32_t line, void** made);
    int (*library_impl)(void* library, const char* name, StackFunction body);
    int (*call_dispatcher)(const char* name, const char* overload, StackWord* stack);
    int (*get_num_threads)(uint32_t* threads);
    int (*get_dim)(TensorHandle, int64_t* dim);
    int (*get_numel)(TensorHandle, int64_t* numel);
    int (*get_dtype)(TensorHandle, int32_t* dtype);
    int (*get_sizes)(TensorHandle, int64_t** sizes);
    int (*get_strides)(TensorHandle, int64_t** strides);
    int (*get_data_ptr)(TensorHandle, void** data);
    int (*empty_strided)(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device,
                         int32_t index, TensorHandle* made);
    int (*delete_tensor)(TensorHandle);
    int32_t float32, bfloat16;      // dtypes by torch's numbers
    int32_t fp8[4];                 // and the formats of
    const Target* formats[4];       // these
};

Torch torch;
std::atomic<int> engine{-1};

Engine current_engine() {
    int now = engine.load(std::memory_order_relaxed);
    if (now < 0) engine.store(now = fastest_engine(), std::memory_order_relaxed);
    return Engine(now);
}

void check(int failure) {
    if (failure) throw std::runtime_error("fp8core.scaled_mm: a call of torch's C interface failed");
}

class Tensor {
public:
    explicit Tensor(StackWord word) : handle(reinterpret_cast<TensorHandle>(word)) {}
    ~Tensor() {
        if (handle) torch.delete_tensor(handle);
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;

    StackWord release() {
        const auto word = reinterpret_cast<StackWord>(handle);
        handle = nullptr;
        return word;
    }

    static Tensor matrix(int64_t rows, int64_t columns, int32_t dtype) {
        const int64_t sizes[2] = {rows, columns}, strides[2] = {columns > 1 ? columns : 1, 1};
        TensorHandle made;
        check(torch.empty_strided(2, sizes, strides, dtype, 0, -1, &made));
        return Tensor(reinterpret_cast<StackWord>(made));
    }

    template <class T> T* data() const {
        void* data;
        check(torch.get_data_ptr(handle, &data));
        return static_cast<T*>(data);
    }

    int32_t dtype() const {
        int32_t dtype;
        check(torch.get_dtype(handle, &dtype));
        return dtype;
    }

    Matrix codes(const char* name) const {
        int64_t dim, *sizes, *strides;
        check(torch.get_dim(handle, &dim));
        check(torch.get_sizes(handle, &sizes));
        check(torch.get_strides(handle, &strides));
        const int32_t type = dtype();
        for (int i = 0; i < 4 && dim == 2; ++i)
            if (type == torch.fp8[i])
                return {data<const uint8_t>(), sizes[0], sizes[1], strides[0], strides[1], torch.formats[i]};
        throw std::runtime_error(std::string("fp8core.scaled_mm: ") + name + " is no FP8 matrix");
    }

    float scale(const char* name) const {
        int64_t numel;
        check(torch.get_numel(handle, &numel));
        if (numel != 1 || dtype() != torch.float32)
            throw std::runtime_error(std::string("fp8core.scaled_mm: ") + name + " is no float32 0-d tensor");
        return *data<const float>();
    }

private:
    TensorHandle handle;
};

// scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, bool power_of_two,
//           bool fast_accum) -> Tensor
void operation(StackWord* stack, uint64_t, uint64_t) {
    const Tensor a(stack[0]), b(stack[1]), scale_a(stack[2]), scale_b(stack[3]);
    const auto out_dtype = int32_t(stack[4]);
    const Matrix a_codes = a.codes("a"), b_codes = b.codes("b");
    if (a_codes.columns != b_codes.rows)
        throw std::runtime_error("fp8core.scaled_mm: a has " + std::to_string(a_codes.columns) + " columns, b " +
                                 std::to_string(b_codes.rows) + " rows; they must be equal");
    const bool narrow = out_dtype == torch.bfloat16;
    uint32_t threads;
    check(torch.get_num_threads(&threads));
    Tensor out = Tensor::matrix(a_codes.rows, b_codes.columns, narrow ? out_dtype : torch.float32);
    scaled_mm(a_codes, b_codes, scale_a.scale("scale_a"), scale_b.scale("scale_b"), out.data<void>(), narrow,
              current_engine(), int(threads));
    stack[0] = out.release();
    if (narrow || out_dtype == torch.float32) return;
    StackWord to[5] = {stack[0], StackWord(out_dtype), 0, 0, 0};  // dtype, non_blocking, copy, no memory format
    check(torch.call_dispatcher("aten::to", "dtype", to));
    stack[0] = to[0];
}

}  // namespace

extern "C" {

int fp8_can_use(int wanted) { return can_use(Engine(wanted)); }
int fp8_engine() { return current_engine(); }
void fp8_use_engine(int wanted) { engine.store(wanted, std::memory_order_relaxed); }

// `out` is contiguous, in bf16 if `narrow`, else in float32. Returns 0, or 1 if there is not enough memory.
int fp8_scaled_mm(const Matrix* a, const Matrix* b, const float* scale_a, const float* scale_b, void* out, int narrow,
                  int threads) {
    try {
        scaled_mm(*a, *b, *scale_a, *scale_b, out, narrow != 0, current_engine(), threads);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// From now on the operation's body on CPU tensors is the one above. To be called once. Returns 0, or torch's failure.
int fp8_register(const Torch* functions) {
    torch = *functions;
    void* library;  // lives as long as the process
    const int failure = torch.library_init_impl("fp8core", "CPU", __FILE__, __LINE__, &library);
    return failure ? failure : torch.library_impl(library, "scaled_mm", operation);
}
}

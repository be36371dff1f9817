// The GEMM as cpu.py calls it, as torch's dispatcher does (torch.ops.fp8core.scaled_mm without Python on the way), and
// as Python does past the dispatcher, where nothing could tell the difference.
//
// A call through Python costs several microseconds before anything is multiplied, as much as a small product. torch
// takes an operation's body as a C function on a stack of 64-bit words: its stable interface, of which cpu.py looks up
// the functions below in the libtorch that the process has loaded. Nothing is compiled or linked against torch or Python.

#include "cpu_gemm.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
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

    TensorHandle get() const { return handle; }

protected:
    TensorHandle handle;
};

class OwnedTensor : public Tensor {
public:
    using Tensor::Tensor;
    ~OwnedTensor() {
        if (handle) torch.delete_tensor(handle);
    }
    OwnedTensor(const OwnedTensor&) = delete;
    OwnedTensor& operator=(const OwnedTensor&) = delete;

    StackWord release() {
        const auto word = reinterpret_cast<StackWord>(handle);
        handle = nullptr;
        return word;
    }

    static OwnedTensor matrix(int64_t rows, int64_t columns, int32_t dtype) {
        const int64_t sizes[2] = {rows, columns}, strides[2] = {columns > 1 ? columns : 1, 1};
        TensorHandle made;
        check(torch.empty_strided(2, sizes, strides, dtype, 0, -1, &made));
        return OwnedTensor(reinterpret_cast<StackWord>(made));
    }
};

// A new tensor, the product in bf16 if that is `out_dtype`, else in float32.
StackWord product(const Tensor& a, const Tensor& b, const Tensor& scale_a, const Tensor& scale_b, int32_t out_dtype) {
    const Matrix a_codes = a.codes("a"), b_codes = b.codes("b");
    if (a_codes.columns != b_codes.rows)
        throw std::runtime_error("fp8core.scaled_mm: a has " + std::to_string(a_codes.columns) + " columns, b " +
                                 std::to_string(b_codes.rows) + " rows; they must be equal");
    const bool narrow = out_dtype == torch.bfloat16;
    uint32_t threads;
    check(torch.get_num_threads(&threads));
    OwnedTensor out = OwnedTensor::matrix(a_codes.rows, b_codes.columns, narrow ? out_dtype : torch.float32);
    scaled_mm(a_codes, b_codes, scale_a.scale("scale_a"), scale_b.scale("scale_b"), out.data<void>(), narrow,
              current_engine(), int(threads));
    return out.release();
}

// scaled_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType out_dtype, bool power_of_two,
//           bool fast_accum) -> Tensor
void operation(StackWord* stack, uint64_t, uint64_t) {
    const OwnedTensor a(stack[0]), b(stack[1]), scale_a(stack[2]), scale_b(stack[3]);
    const auto out_dtype = int32_t(stack[4]);
    stack[0] = product(a, b, scale_a, scale_b, out_dtype);
    if (out_dtype == torch.bfloat16 || out_dtype == torch.float32) return;
    StackWord to[5] = {stack[0], StackWord(out_dtype), 0, 0, 0};  // dtype, non_blocking, copy, no memory format
    check(torch.call_dispatcher("aten::to", "dtype", to));
    stack[0] = to[0];
}

// ---------------------------------------------------------------------------------------------- past the dispatcher
//
// A call of `scaled_mm` by torch.ops costs 3 us, most of it to make a stack of boxed values and to see who wants to see
// the call. Here that is looked up first: whoever intercepts operations does so by a dispatch key of a tensor or of the
// thread, by a mode for torch functions, or by a profiler's callback. cpu_direct.py finds out where these are kept.

struct PyObject;

struct PyMethodDef {  // Python's
    const char* name;
    PyObject* (*body)(PyObject* self, PyObject* const* arguments, intptr_t count);
    int flags;
    const char* doc;
};

struct Direct {  // cpu_direct.py's _Direct, field for field
    bool (*torch_function_mode_enabled)();
    bool (*has_callbacks)();
    bool (*requires_grad)(const void* impl);
    PyObject* (*wrap)(TensorHandle);
    void* (*save_thread)();
    void (*restore_thread)(void*);
    PyObject* (*new_reference)(const PyObject*);
    void* (*dlsym)(void* library, const char* name);
    void* libc10;
    const PyObject *none, *tensor_class, *float32, *bfloat16;
    int64_t class_at, impl_at, keys_at;  // bytes: of a tensor's object, of it, and of what its `impl` points to
    uint64_t tensor_keys[2];             // of plain tensors, made outside and inside of inference mode
    uint64_t thread_keys[2];             // of a thread without modes, outside and inside of inference mode
};

Direct direct;

template <class T> T word_at(const void* object, int64_t offset) {
    return load<T>(static_cast<const char*>(object) + offset);
}

// The dispatch keys that this thread adds to those of tensors, as torch stores them.
uint64_t thread_keys() {
    static thread_local const void* const keys =
        direct.dlsym(direct.libc10, "_ZN3c104impl26raw_local_dispatch_key_setE");
    return word_at<uint64_t>(keys, 0);
}

bool is_one_of(const uint64_t (&known)[2], uint64_t keys) { return keys == known[0] || keys == known[1]; }

// A tensor on the CPU without a subclass, a wrapper, lazy arithmetic or a gradient.
bool is_plain(const PyObject* object) {
    if (word_at<const PyObject*>(object, direct.class_at) != direct.tensor_class) return false;
    const void* const impl = word_at<const void*>(object, direct.impl_at);
    return is_one_of(direct.tensor_keys, word_at<uint64_t>(impl, direct.keys_at)) && !direct.requires_grad(impl);
}

bool nobody_watches() {
    return is_one_of(direct.thread_keys, thread_keys()) && !direct.torch_function_mode_enabled() &&
           !direct.has_callbacks();
}

class WithoutGil {
public:
    WithoutGil() : state(direct.save_thread()) {}
    ~WithoutGil() { direct.restore_thread(state); }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;

private:
    void* const state;
};

// (a, b, scale_a, scale_b, out_dtype) -> the product, or None: then it is for the operation, and so are its errors.
PyObject* product_or_none(PyObject*, PyObject* const* arguments, intptr_t count) {
    const auto is_direct = [&] {
        if (count != 5 || (arguments[4] != direct.float32 && arguments[4] != direct.bfloat16)) return false;
        return std::all_of(arguments, arguments + 4, is_plain) && nobody_watches();
    };
    if (is_direct()) {
        const auto tensor = [&](int i) { return Tensor(StackWord(arguments[i]) + StackWord(direct.impl_at)); };
        try {
            std::optional<WithoutGil> without_gil(std::in_place);
            const OwnedTensor out(product(tensor(0), tensor(1), tensor(2), tensor(3),
                                          arguments[4] == direct.bfloat16 ? torch.bfloat16 : torch.float32));
            without_gil.reset();
            return direct.wrap(out.get());
        } catch (...) {
        }
    }
    return direct.new_reference(direct.none);
}

const PyMethodDef method{"scaled_mm", product_or_none, 0x80 /* METH_FASTCALL */, nullptr};

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

// `found` lasts for the process. To be called before the next two.
void fp8_use_direct(const Direct* found) { direct = *found; }
uint64_t fp8_thread_keys() { return thread_keys(); }
const PyMethodDef* fp8_direct_method() { return &method; }
}

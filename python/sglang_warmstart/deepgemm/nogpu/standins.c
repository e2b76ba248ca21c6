/* Stand-ins for the CUDA driver, the CUDA runtime, cuBLAS and NVRTC, and for torch's two CUDA libraries, as far as the
   host library of DeepGEMM calls them. They describe a GPU. No kernel runs, and no memory is a GPU's.

   One source, compiled once for each library with -DSTANDS_FOR_x. No header of CUDA is needed: what is known of its
   types is below, from CUDA 13's cuda.h and driver_types.h.

   What is not stood in for is not there: the loader, or the library itself, then names it. What is there for the
   loader's sake alone returns an error after it has said its name. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOT_SUPPORTED 801 /* cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED */
#define INVALID_VALUE 1
#define FILE_NOT_FOUND 301
#define INVALID_CLUSTER_SIZE 912

#define UNSUPPORTED(name)                                                             \
    int name(void) {                                                                  \
        fprintf(stderr, "warmstart: %s is called, and has no stand-in\n", #name);     \
        return NOT_SUPPORTED;                                                         \
    }

#ifdef STANDS_FOR_CUDA

const char *const describe_error[] = {"error of a stand-in for the CUDA driver"};

int cuGetErrorName(int error, const char **text) {
    *text = describe_error[0];
    return 0;
}

int cuGetErrorString(int error, const char **text) { return cuGetErrorName(error, text); }

int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }

int cuLibraryLoadFromFile(void **library, const char *path, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
    FILE *file = fopen(path, "rb");
    if (!file) return FILE_NOT_FOUND;
    fclose(file);
    *library = malloc(1);
    return 0;
}

int cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
    *library = malloc(1);
    return 0;
}

int cuLibraryUnload(void *library) {
    free(library);
    return 0;
}

int cuLibraryGetKernelCount(unsigned *count, void *library) {
    *count = 1;
    return 0;
}

int cuLibraryEnumerateKernels(void **kernels, unsigned count, void *library) {
    if (count) kernels[0] = library;
    return 0;
}

int cuKernelGetFunction(void **function, void *kernel) {
    *function = kernel;
    return 0;
}

/* CUlaunchConfig and CUlaunchAttribute; the latter is 72 bytes long. */
struct attribute {
    int id, padding;
    unsigned value[16];
};
struct configuration {
    unsigned grid[3], block[3], shared_bytes;
    void *stream;
    struct attribute *attributes;
    unsigned count;
};
#define CLUSTER_DIMENSION 4

/* A launch that a driver would refuse is refused: a kernel that cannot be launched is none that a server needs. */
int cuLaunchKernelEx(const struct configuration *launch, void *function, void **parameters, void **extra) {
    const unsigned *grid = launch->grid, *block = launch->block;
    if (!grid[0] || !grid[1] || !grid[2] || !block[0] || grid[1] > 65535 || grid[2] > 65535) return INVALID_VALUE;
    if (block[0] * block[1] * block[2] > 1024) return INVALID_VALUE;
    for (unsigned i = 0; i < launch->count; i++)
        if (launch->attributes[i].id == CLUSTER_DIMENSION) {
            unsigned wide = launch->attributes[i].value[0];
            if (!wide || wide > 8 || grid[0] % wide) return INVALID_CLUSTER_SIZE;
        }
    return 0;
}

/* Bytes of an element, by CUtensorMapDataType; 0 for those that are packed. */
static const unsigned char element_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4, 0, 0, 0};

/* What the documentation of cuTensorMapEncodeTiled asks for. */
int cuTensorMapEncodeTiled(void *map, unsigned type, unsigned rank, void *address, const uint64_t *sizes,
                           const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                           int interleave, int swizzle, int promotion, int fill) {
    memset(map, 0, 128);
    if (type >= sizeof element_bytes || rank < 1 || rank > 5 || ((uintptr_t)address & 15)) return INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > (1ull << 32) || !box[i] || box[i] > 256) return INVALID_VALUE;
        if (i + 1 < rank && ((strides[i] & 15) || strides[i] >= (1ull << 40))) return INVALID_VALUE;
    }
    unsigned bytes = element_bytes[type], limit = swizzle ? 16u << swizzle : ~0u; /* 32, 64 and 128 bytes */
    if (bytes && ((box[0] * bytes & 15) || (swizzle <= 3 && box[0] * bytes > limit))) return INVALID_VALUE;
    return 0;
}
#endif

#ifdef STANDS_FOR_CUDART
/* cudaDeviceProp of CUDA 13: its size, and where in it is what DeepGEMM reads. */
#define PROPERTIES_BYTES 1008
#define MAJOR 360
#define MINOR 364
#define SM_COUNT 384
#define L2_BYTES 596
#define SHARED_BYTES_OPTIN 672

static int sms, major, minor, l2_bytes, shared_bytes, other_bytes;

/* To be called first. `other` fills every byte of the properties that is not described, so that a test can see that
   nothing else is looked at. */
void warmstart_describe(int sm_count, int capability_major, int capability_minor, int l2, int shared, int other) {
    sms = sm_count;
    major = capability_major;
    minor = capability_minor;
    l2_bytes = l2;
    shared_bytes = shared;
    other_bytes = other;
}

int cudaGetDevice(int *device) {
    *device = 0;
    return 0;
}

int cudaGetDeviceProperties(char *properties, int device) {
    if (!sms) return NOT_SUPPORTED;
    memset(properties, other_bytes, PROPERTIES_BYTES);
    strcpy(properties, "a GPU that is only described");
    memcpy(properties + SM_COUNT, &sms, sizeof sms);
    memcpy(properties + MAJOR, &major, sizeof major);
    memcpy(properties + MINOR, &minor, sizeof minor);
    memcpy(properties + L2_BYTES, &l2_bytes, sizeof l2_bytes);
    memcpy(properties + SHARED_BYTES_OPTIN, &shared_bytes, sizeof shared_bytes);
    return 0;
}

const char *cudaGetErrorName(int error) { return "error of a stand-in for the CUDA runtime"; }
const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }
int cudaMemsetAsync(void *place, int value, size_t bytes, void *stream) { return 0; }
int cudaMemset2DAsync(void *place, size_t pitch, int value, size_t width, size_t height, void *stream) { return 0; }
int cudaFree(void *place) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }

int cudaStreamIsCapturing(void *stream, int *status) {
    *status = 0;
    return 0;
}

int aoti_torch_get_current_device_index(int32_t *device) {
    *device = 0;
    return 0;
}
#endif

#ifdef STANDS_FOR_TENSOR_MAKER
#include <dlfcn.h>

/* DeepGEMM up to 0.2.2 takes tensors by tvm-ffi, and makes at::Tensor of them that it says are CUDA's. Here they are made
   as the CPU's. In at::TensorMaker (ATen/ops/from_blob.h of torch 2.11 to 2.13) the options lie at byte 116: the type of
   the device, its number, ... From 0.1.6 on DeepGEMM asks each tensor whether it is CUDA's: see marked.py. */
#define OPTIONS 116
#define CPU 0
#define CUDA 1

static long mark_keys, mark_device;
static uint64_t mark_bits;

/* From now on, change these bits of the dispatch keys of each tensor that is made, and its device. */
void warmstart_mark(long keys, uint64_t bits, long device) {
    mark_keys = keys;
    mark_bits = bits;
    mark_device = device;
}

void *_ZN2at11TensorMaker11make_tensorEv(void *result, char *maker) {
    static void *(*made)(void *, void *);
    if (!made) {
        void *torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        made = torch ? dlsym(torch, "_ZN2at11TensorMaker11make_tensorEv") : 0;
        if (!made) {
            fprintf(stderr, "warmstart: libtorch_cpu.so has no at::TensorMaker\n");
            _Exit(70);
        }
    }
    if (maker[OPTIONS] != CUDA || maker[OPTIONS + 1] != 0) return made(result, maker); /* one of torch's own */
    maker[OPTIONS] = CPU;
    maker[OPTIONS + 1] = -1;
    char **tensor = made(result, maker);
    if (mark_bits) {
        *(uint64_t *)(*tensor + mark_keys) ^= mark_bits;
        (*tensor)[mark_device] = CUDA;
        (*tensor)[mark_device + 1] = 0;
    }
    return tensor;
}
#endif

#ifdef STANDS_FOR_C10_CUDA
struct stream {
    int8_t type, index;
    int64_t number;
};

struct stream _ZN3c104cuda20getCurrentCUDAStreamEa(signed char device) {
    struct stream current = {1, 0, 0};
    return current;
}
void *_ZNK3c104cuda10CUDAStream6streamEv(const void *stream) { return 0; }
signed char _ZN3c104cuda14current_deviceEv(void) { return 0; }
void _ZN3c104cuda19CUDAErrorLogCaptureC1Ev(void *capture) {}

/* c10_cuda_check_implementation: without the fifth kind of argument up to torch 2.11, with it later. */
void _ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jb(int error, const char *file, const char *function,
                                                           unsigned line, int sync) {
    if (error) {
        fprintf(stderr, "warmstart: CUDA error %d of a stand-in, in %s:%u\n", error, file, line);
        _Exit(70);
    }
}
void _ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jbPNS0_19CUDAErrorLogCaptureE(
    int error, const char *file, const char *function, unsigned line, int sync, void *capture) {
    _ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jb(error, file, function, line, sync);
}
#endif

#ifdef STANDS_FOR_TORCH_CUDA
int aoti_torch_get_current_cuda_stream(int32_t device, void **stream) {
    *stream = 0;
    return 0;
}
UNSUPPORTED(_ZN2at4cuda26getCurrentCUDABlasLtHandleEv)
#endif

#ifdef STANDS_FOR_CUBLAS
const char *cublasGetStatusString(int status) { return "error of a stand-in for cuBLAS"; }
#endif

#ifdef STANDS_FOR_CUBLASLT
/* cuBLASLt takes over some shapes. It has kernels of its own and compiles none: it need only seem to work. */
#define MADE(name)                  \
    int name(void **handle) {       \
        *handle = (void *)16;       \
        return 0;                   \
    }
#define DONE(name) \
    int name(void) { return 0; }
MADE(cublasLtCreate)
MADE(cublasLtMatmulDescCreate)
MADE(cublasLtMatmulPreferenceCreate)
MADE(cublasLtMatrixLayoutCreate)
DONE(cublasLtDestroy)
DONE(cublasLtMatmul)
DONE(cublasLtMatmulDescDestroy)
DONE(cublasLtMatmulDescSetAttribute)
DONE(cublasLtMatmulPreferenceDestroy)
DONE(cublasLtMatmulPreferenceSetAttribute)
DONE(cublasLtMatrixLayoutDestroy)
DONE(cublasLtMatrixLayoutSetAttribute)

/* cublasLtMatmulHeuristicResult_t: 64 bytes of an algorithm, the size of its workspace, a status, ... */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
    memset(results, 0, 96);
    *found = 1;
    return 0;
}
#endif

#ifdef STANDS_FOR_NVRTC
/* DeepGEMM 0.1.x is linked to it, and calls it only if DG_JIT_USE_NVRTC is set. */
UNSUPPORTED(nvrtcCompileProgram)
UNSUPPORTED(nvrtcCreateProgram)
UNSUPPORTED(nvrtcDestroyProgram)
UNSUPPORTED(nvrtcGetCUBIN)
UNSUPPORTED(nvrtcGetCUBINSize)
UNSUPPORTED(nvrtcGetErrorString)
UNSUPPORTED(nvrtcGetPTX)
UNSUPPORTED(nvrtcGetPTXSize)
UNSUPPORTED(nvrtcGetProgramLog)
UNSUPPORTED(nvrtcGetProgramLogSize)
UNSUPPORTED(nvrtcVersion)
#endif

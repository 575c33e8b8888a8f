# The CUDA backend on the CPU: the sources of libqvl/device/cuda, unchanged, over the emulator of this folder.
# -mfma: fmaf would be a library call otherwise, and the kernels call little else.
EMU_CXX ?= g++
EMU_FLAGS = -std=c++17 -O3 -mavx2 -mfma -g -fPIC -fvisibility=hidden -ffp-contract=off -pthread -DQVL_CUDA_EMU -isystem $(CUDA_HOME)/include -Itests/cuda_emu -Wall -Wextra \
	-Wno-unknown-pragmas -Wno-missing-field-initializers
EMU_SO := $(B)/emu/libqvl-cuda.so
EMU_OBJ := $(patsubst %,$(B)/emu/%.o,$(wildcard tests/cuda_emu/emu_*.cpp) $(CUDA_SRC))
.PHONY: emu-headers
emu-headers:
	@for h in cuda_runtime.h cuda_bf16.h crt/host_defines.h cublasLt.h nccl.h; do [ -e $(CUDA_HOME)/include/$$h ] || { \
		echo "The CUDA emulator needs the CUDA toolkit's headers (no GPU, no driver); $(CUDA_HOME)/include/$$h is missing." >&2; \
		echo "Install cuda-cudart-dev, cuda-crt, libcublas-dev and libnccl-dev from NVIDIA's Debian repository, or set CUDA_HOME." >&2; exit 1; }; done
$(B)/emu/%.cpp.o: %.cpp | emu-headers
	@mkdir -p $(@D)
	$(SAY) EMU $<
	$(Q)$(EMU_CXX) $(EMU_FLAGS) -MMD -MP -c $< -o $@
$(B)/emu/%.cu.o: %.cu | emu-headers
	@mkdir -p $(@D)
	$(SAY) EMU $<
	$(Q)$(EMU_CXX) -x c++ $(EMU_FLAGS) -MMD -MP -c $< -o $@
$(EMU_SO): $(EMU_OBJ)
	$(SAY) LD $@
	$(Q)$(EMU_CXX) -shared -Wl,--no-undefined -pthread -o $@ $^

$(B)/tests/ops/cuda_ops: tests/ops/shim.h
# Everything that shows the backend right without a GPU. The three modes of the op tests run side by side.
EMU_ENV = QVL_EMU_MEMORY=4294967296 QVL_CUDA_PLUGIN=$(CURDIR)/$(EMU_SO)
.PHONY: check-emu check-emu-ops check-emu-faults check-emu-goldens check-cuda-static
check-emu: check-emu-faults check-emu-ops check-emu-goldens ## the CUDA backend on the CPU: planted faults, ops, goldens (needs the CUDA toolkit's headers)
check-emu-faults: $(EMU_SO) $(B)/tests/ops/cuda_ops
	$(PYTHON) tests/cuda_emu/mutants.py $(B) $(EMU_CXX) $(EMU_FLAGS) -w
# A mode, or one test of it: deterministic:test_vision.
EMU_MODES ?= exact deterministic fast
check-emu-ops: $(EMU_SO) $(B)/tests/ops/cuda_ops
	@printf '%s\n' $(EMU_MODES) | $(EMU_ENV) xargs -P $$(nproc) -I{} sh -c 'log=$(B)/emu/{}.log; $(B)/tests/ops/cuda_ops $$(echo {} | tr : " ") >$$log 2>&1; rc=$$?; cat $$log; exit $$rc'
# EMU_GOLDENS and EMU_DEVICE choose some of them ("-k ..."): all take half an hour.
EMU_GOLDENS ?=
EMU_DEVICE ?=
check-emu-goldens: all $(EMU_SO)
	$(EMU_ENV) QVL_TEST_DEVICE=cuda $(PYTEST) tests/python/test_goldens.py tests/python/test_moe.py $(EMU_GOLDENS)
	$(EMU_ENV) QVL_EMU_ASYNC=lazy QVL_TEST_DEVICE=cuda $(PYTEST) tests/python/test_device.py $(EMU_DEVICE)
check-cuda-static: cuda ## registers, stack and instructions of the compiled CUDA kernels against tests/cuda/budgets.json
	/usr/bin/python3 tests/cuda/static.py --table $(CUDA_OBJ)

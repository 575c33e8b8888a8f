# The CUDA backend on the CPU: the sources of libqvl/device/cuda, unchanged, over the emulator of this folder.
# -mfma: fmaf would be a library call otherwise, and the kernels call little else.
EMU_CXX ?= g++
EMU_FLAGS = -std=c++17 -O3 -mavx2 -mfma -g -fPIC -fvisibility=hidden -ffp-contract=off -pthread -DQVL_CUDA_EMU -isystem $(CUDA_HOME)/include -Itests/cuda_emu -Wall -Wextra \
	-Wno-unknown-pragmas -Wno-missing-field-initializers
# Three builds of it: fast; check, which records every access of kernels and names races, bounds, alignment and what nobody
# wrote (emu_check.cpp stands in for -fsanitize=thread's library); asan. What differs for kernels, for the emulator, in linking:
EMU_KINDS := fast check asan
EMU_DIR_fast := $(B)/emu
EMU_DIR_check := $(B)/emu_check
EMU_DIR_asan := $(B)/emu_asan
# Without SRA a uint4 is one access, as it is on a GPU.
EMU_KERNEL_check := -fsanitize=thread,alignment -fsanitize-undefined-trap-on-error -fno-tree-sra -fno-ipa-sra
EMU_KERNEL_asan := -fsanitize=address,undefined -fno-sanitize-recover=all
EMU_OWN_check := -DQVL_EMU_CHECK
EMU_OWN_asan := -fsanitize=address
EMU_LINK_asan := -fsanitize=address,undefined
EMU_PARTS := core memory rt blaslt nccl
EMU_PARTS_check := check count
# Which of them the check-emu targets run: make check-emu-ops EMU_KIND=check.
EMU_KIND ?= fast
EMU_DIR = $(EMU_DIR_$(EMU_KIND))
EMU_SO = $(EMU_DIR)/libqvl-cuda.so
.PHONY: emu-headers
emu-headers:
	@for h in cuda_runtime.h cuda_bf16.h crt/host_defines.h cublasLt.h nccl.h; do [ -e $(CUDA_HOME)/include/$$h ] || { \
		echo "The CUDA emulator needs the CUDA toolkit's headers (no GPU, no driver); $(CUDA_HOME)/include/$$h is missing." >&2; \
		echo "Install cuda-cudart-dev, cuda-crt, libcublas-dev and libnccl-dev from NVIDIA's Debian repository, or set CUDA_HOME." >&2; exit 1; }; done
define emu_kind
EMU_OBJ_$1 := $$(patsubst %,$(EMU_DIR_$1)/tests/cuda_emu/emu_%.cpp.o,$(EMU_PARTS) $(EMU_PARTS_$1))
EMU_SELF_$1 := $$(patsubst %,$(B)/emu_self/$1/test_%.o,emu kernels host)
$(EMU_DIR_$1)/%.cpp.o: %.cpp | emu-headers
	@mkdir -p $$(@D)
	$$(SAY) EMU "$$< ($1)"
	$$(Q)$$(EMU_CXX) $$(EMU_FLAGS) $(EMU_OWN_$1) -MMD -MP -c $$< -o $$@
$(EMU_DIR_$1)/%.cu.o: %.cu | emu-headers
	@mkdir -p $$(@D)
	$$(SAY) EMU "$$< ($1)"
	$$(Q)$$(EMU_CXX) -x c++ $$(EMU_FLAGS) $(EMU_KERNEL_$1) -MMD -MP -c $$< -o $$@
$(EMU_DIR_$1)/libqvl-cuda.so: $$(EMU_OBJ_$1) $(patsubst %,$(EMU_DIR_$1)/%.o,$(CUDA_SRC))
	$$(SAY) LD $$@
	$$(Q)$$(EMU_CXX) -shared -Wl,--no-undefined -pthread $(EMU_LINK_$1) -o $$@ $$^
$(B)/emu_self/$1/test_%.o: tests/cuda_emu/test_%.cpp | emu-headers
	@mkdir -p $$(@D)
	$$(SAY) EMU "$$< ($1)"
	$$(Q)$$(EMU_CXX) $$(EMU_FLAGS) $(EMU_KERNEL_$1) -DEMU_KIND='"$1"' -MMD -MP -c $$< -o $$@
$(B)/emu_self/$1/test_emu: $$(EMU_SELF_$1) $$(EMU_OBJ_$1)
	$$(SAY) LD $$@
	$$(Q)$$(EMU_CXX) -pthread $(EMU_LINK_$1) -o $$@ $$^
endef
$(foreach k,$(EMU_KINDS),$(eval $(call emu_kind,$k)))

.PHONY: check-emu-self
check-emu-self: $(EMU_KINDS:%=$(B)/emu_self/%/test_emu) ## the CUDA emulator against itself: planted faults in small kernels and host code
	@for k in $(EMU_KINDS); do $(B)/emu_self/$$k/test_emu $(B)/emu_self/$$k.table || exit 1; done
	@tests/cuda_emu/table.sh $(EMU_KINDS:%=$(B)/emu_self/%.table)

$(B)/tests/ops/cuda_ops: tests/ops/shim.h
# Everything that shows the backend right without a GPU. The three modes of the op tests run side by side.
EMU_ENV = QVL_EMU_MEMORY=4294967296 QVL_EMU_DEVICES=4 QVL_CUDA_PLUGIN=$(CURDIR)/$(EMU_SO) $(if $(filter asan,$(EMU_KIND)),ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$($(EMU_CXX) -print-file-name=libasan.so))
.PHONY: check-emu-counts check-emu check-emu-ops check-emu-faults check-emu-goldens check-cuda-static
check-emu: check-emu-faults check-emu-ops check-emu-goldens ## the CUDA backend on the CPU: planted faults, ops, goldens (needs the CUDA toolkit's headers)
check-emu-faults: $(EMU_SO) $(B)/tests/ops/cuda_ops
	$(PYTHON) tests/cuda_emu/mutants.py $(B) $(EMU_DIR) $(EMU_CXX) $(EMU_FLAGS) $(EMU_KERNEL_$(EMU_KIND)) -w
# Every barrier, wait and bound in turn, hours; one that was interrupted goes on. MUTATE="--only=flash,moe_list --rules=barrier,wait" for some, --list to see them.
MUTATE ?=
.PHONY: check-emu-mutants
check-emu-mutants: $(B)/tests/ops/cuda_ops $(foreach k,$(EMU_KINDS),$(EMU_DIR_$k)/libqvl-cuda.so) ## every barrier, wait and bound of the CUDA backend taken away in turn: a test must fail
	$(PYTHON) tests/cuda_emu/sweep.py $(MUTATE) $(B) $(EMU_CXX) $(foreach k,$(EMU_KINDS),$k $(EMU_DIR_$k) "$(EMU_FLAGS) $(EMU_KERNEL_$k)")
# A mode, or one test of it: deterministic:test_vision.
EMU_MODES ?= exact deterministic fast
check-emu-ops: $(EMU_SO) $(B)/tests/ops/cuda_ops
	@printf '%s\n' $(EMU_MODES) | $(EMU_ENV) xargs -P $$(nproc) -I{} sh -c 'log=$(EMU_DIR)/{}.log; $(B)/tests/ops/cuda_ops $$(echo {} | tr : " ") >$$log 2>&1; rc=$$?; cat $$log; exit $$rc'
# EMU_GOLDENS and EMU_DEVICE choose some of them ("-k ..."): all take half an hour.
EMU_GOLDENS ?=
EMU_DEVICE ?=
# GPUs that share the model.
EMU_GPUS ?= 1
EMU_ENV += $(if $(filter-out 1,$(EMU_GPUS)),QVL_TEST_GPUS=$(EMU_GPUS))
check-emu-goldens: all $(EMU_SO)
	$(EMU_ENV) QVL_TEST_DEVICE=cuda $(PYTEST) tests/python/test_goldens.py tests/python/test_moe.py tests/python/test_fp8.py $(EMU_GOLDENS)
	$(EMU_ENV) QVL_EMU_ASYNC=lazy QVL_TEST_DEVICE=cuda $(PYTEST) tests/python/test_device.py $(EMU_DEVICE)
# In a mode each: they choose different kernels.
check-emu-counts: $(EMU_DIR_check)/libqvl-cuda.so $(B)/tests/ops/cuda_ops ## sectors and bank conflicts of the CUDA kernels, counted under emulation
	@rm -f $(EMU_DIR_check)/counts
	@for mode in fast deterministic exact; do QVL_EMU_COUNT=$(EMU_DIR_check)/counts QVL_CUDA_PLUGIN=$(CURDIR)/$(EMU_DIR_check)/libqvl-cuda.so \
		$(B)/tests/ops/cuda_ops $$mode test_counts >$(EMU_DIR_check)/counts.log 2>&1 || { cat $(EMU_DIR_check)/counts.log; exit 1; }; done
	@/usr/bin/python3 tests/cuda_emu/counts.py $(EMU_DIR_check)/libqvl-cuda.so $(EMU_DIR_check)/counts
check-cuda-static: cuda ## registers, stack and instructions of the compiled CUDA kernels against tests/cuda/budgets.json
	/usr/bin/python3 tests/cuda/static.py --table $(CUDA_OBJ)

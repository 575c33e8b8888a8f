# The CUDA backend on the CPU: the sources of libqvl/device/cuda, unchanged, over the emulator of this folder.
EMU_CXX ?= g++
EMU_FLAGS = -std=c++17 -O2 -g -fPIC -fvisibility=hidden -ffp-contract=off -pthread -DQVL_CUDA_EMU -isystem $(CUDA_HOME)/include -Itests/cuda_emu -Wall -Wextra \
	-Wno-unknown-pragmas -Wno-missing-field-initializers $(EMU_SAN)
EMU_SO := $(B)/emu/libqvl-cuda.so
EMU_OBJ := $(patsubst %,$(B)/emu/%.o,$(wildcard tests/cuda_emu/*.cpp) $(CUDA_SRC))
$(B)/emu/%.cpp.o: %.cpp
	@mkdir -p $(@D)
	$(SAY) EMU $<
	$(Q)$(EMU_CXX) $(EMU_FLAGS) -MMD -MP -c $< -o $@
$(B)/emu/%.cu.o: %.cu
	@mkdir -p $(@D)
	$(SAY) EMU $<
	$(Q)$(EMU_CXX) -x c++ $(EMU_FLAGS) -MMD -MP -c $< -o $@
$(EMU_SO): $(EMU_OBJ)
	$(SAY) LD $@
	$(Q)$(EMU_CXX) -shared $(EMU_SAN) -Wl,--no-undefined -pthread -o $@ $^

$(B)/tests/ops/cuda_ops: tests/ops/shim.h
.PHONY: check-emu
check-emu: all $(EMU_SO) $(B)/tests/ops/cuda_ops ## the CUDA backend under emulation: ops, goldens (needs the CUDA toolkit's headers)
	QVL_CUDA_PLUGIN=$(CURDIR)/$(EMU_SO) $(B)/tests/ops/cuda_ops

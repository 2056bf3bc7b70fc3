//! `kvcellar._native.TierEngine`: one call a request or a step.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use super::PyConfig;
use super::errors::guarded;
use super::inputs::{self, OwnedOffer, PyOffer};
use super::reports::{DiskReport, EngineStats, ForgetReport, PoolReport, ResetReport, run_object};
use kvcellar_block::error::{Error, Result};
use kvcellar_block::geometry::RankBytes;
use kvcellar_block::{BlockKey, Grouping, SaltTag, SlotGeometry, Tier};
use kvcellar_engine::config::{Config, Controls};
use kvcellar_engine::pool::Pool;
use kvcellar_engine::pool::open::{self, Wish};
use kvcellar_engine::tier::load::Hit;
use kvcellar_engine::tier::mover::{self, Mover};
use kvcellar_engine::tier::offload::{Offer, Start};
use kvcellar_engine::tier::opening::{self, Identity};
use kvcellar_engine::tier::warm_table::WarmTable;
use kvcellar_engine::tier::{Arrival, TierEngine, namespace};

/// The tier engine of one `EngineCore`.
#[pyclass(frozen, name = "TierEngine", module = "kvcellar._native")]
pub(super) struct PyTierEngine {
    config: Config,
    engine: Arc<Mutex<TierEngine>>,
    mover: Mutex<Option<Mover>>,
}

impl PyTierEngine {
    fn lock(&self) -> MutexGuard<'_, TierEngine> {
        // A panic in an earlier call was reported then; the engine's own invariants are
        // re-established by each operation.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the engine without the GIL.
    fn run<T: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut TierEngine) -> Result<T> + Send) -> PyResult<T> {
        py.detach(|| guarded(|| work(&mut self.lock())))
    }
}

fn apply(engine: &mut TierEngine, offer: OwnedOffer, start: Start) {
    let OwnedOffer { request, hashes, tokens_from, tokens, groups } = offer;
    engine.add_hashes(&request, &hashes);
    engine.offer(&Offer { request: &request, tokens_from, tokens, groups }, start);
}

#[pymethods]
impl PyTierEngine {
    /// `grouping`: JSON of the model's KV cache groups and block sizes.
    #[new]
    fn new(config: &PyConfig, grouping: &str) -> PyResult<Self> {
        guarded(|| {
            let grouping: Grouping = serde_json::from_str(grouping)
                .map_err(|error| Error::config("grouping", error.to_string(), "This is a bug in the connector"))?;
            let engine = Arc::new(Mutex::new(TierEngine::new(&config.inner, grouping)?));
            Ok(Self { config: config.inner.clone(), engine, mover: Mutex::new(None) })
        })
    }

    /// Creates or adopts the pool. `ranks`: JSON list of what each rank offers; `facts`: JSON
    /// object that makes up the namespace; `stable`: block hashes mean the same after a restart.
    /// `progress(done, total)` is called in bytes. `near`: memory nodes next to the ranks' devices,
    /// where they are known. `engines`: engines on this machine that share the configured size.
    #[pyo3(signature = (ranks, facts, stable, progress, near=Vec::new(), engines=1))]
    #[expect(clippy::too_many_arguments, reason = "Python names them")]
    fn open_pool(
        &self,
        py: Python<'_>,
        ranks: &str,
        facts: &str,
        stable: bool,
        progress: Py<PyAny>,
        near: Vec<u32>,
        engines: u32,
    ) -> PyResult<PoolReport> {
        let config = self.config.clone();
        py.detach(|| {
            guarded(|| {
                // An earlier pool of this process may still be mapped, which would keep it from
                // being adopted.
                #[cfg(feature = "cuda")]
                kvcellar_engine::gpu::cuda::pinning::settle();
                let ranks: Vec<RankBytes> = serde_json::from_str(ranks)
                    .map_err(|error| Error::config("ranks", error.to_string(), "This is a bug in the connector"))?;
                let grouping = self.lock().grouping().clone();
                let geometry = SlotGeometry::lay_out(&grouping, &ranks)?;
                let (facts, namespace) = namespace::fingerprint(facts, &grouping, &geometry, &config)?;
                let wish = Wish {
                    pool_dir: &config.pool_dir,
                    namespace,
                    facts: &facts,
                    bytes: (config.dram_bytes / u64::from(engines.max(1))).max(1),
                    total: config.dram_bytes,
                    explicit: config.dram_explicit,
                    adopt: config.keep_pool && stable && !self.lock().is_private(),
                    geometry: &geometry,
                    near: &near,
                };
                let mut report = |done: u64, total: u64| {
                    // A progress line that cannot be shown must not stop the start.
                    Python::attach(|py| drop(progress.call1(py, (done, total))));
                };
                let opened = open::open(&wish, &mut report)?;
                let pool_facts =
                    (opened.pool.path().display().to_string(), opened.pool.slot_count(), opened.pool.bytes());
                // Asked here, where a start may take its time; steps only read what was found.
                let huge_bytes = opened.pool.huge_bytes();
                let adopted_blocks = self.lock().open_pool(opened.pool, opened.adopted);
                let identity = Identity { namespace, facts: &facts, stable };
                let disk =
                    opening::open_disk(&self.engine, &config, identity, engines, &mut report)?.map(|(mover, disk)| {
                        *self.mover.lock().unwrap_or_else(PoisonError::into_inner) = mover;
                        DiskReport::from(disk)
                    });
                Ok(PoolReport {
                    path: pool_facts.0,
                    slots: pool_facts.1,
                    slot_bytes: geometry.slot_bytes,
                    bytes: pool_facts.2,
                    huge_bytes,
                    bound: opened.budget.map_or("the adopted pool".to_owned(), |budget| budget.bound.to_string()),
                    adopted_blocks,
                    taken: opened.taken,
                    warnings: opened.warnings,
                    removed: opened.removed,
                    disk,
                })
            })
        })
    }

    /// What workers need to attach, as JSON; `None` without a pool.
    fn ticket(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.run(py, |engine| Ok(engine.pool().map(|pool| serde_json::to_string(&pool.ticket()).unwrap_or_default())))
    }

    /// Every worker maps the pool. Without `keep_pool` its name goes now, so that its memory goes
    /// with the last process, however that ends; a claim stands for it among what all engines have.
    fn attached(&self, py: Python<'_>) -> PyResult<()> {
        let keep = self.config.keep_pool;
        self.run(py, |engine| engine.pool().filter(|_| !keep).map_or(Ok(()), |pool| pool.hide()))
    }

    /// A request arrived. `controls`: JSON object of the user's wishes, or `None`; `adapter`: 16
    /// bytes that say what its LoRA adapter consists of, nothing without one; `salt`: the bytes of
    /// its `cache_salt`, nothing without one.
    #[pyo3(signature = (request, controls, lora_name, adapter=inputs::NO_ADAPTER, salt=inputs::NO_SALT))]
    fn add_request(
        &self,
        py: Python<'_>,
        request: &str,
        controls: Option<&str>,
        lora_name: &str,
        adapter: &[u8],
        salt: &[u8],
    ) -> PyResult<()> {
        let adapter = inputs::adapter(adapter)?;
        self.run(py, |engine| {
            TierEngine::check_request_id(request)?;
            let controls = controls.map(Controls::parse).transpose()?.unwrap_or_default();
            engine.add_request(request, Arrival { controls, salt: SaltTag::of(salt), lora: lora_name, adapter });
            Ok(())
        })
    }

    /// Tokens beyond `local` that can be loaded; `None`: ask again next step. `hashes`: block
    /// hashes the engine does not have yet.
    fn lookup(
        &self,
        py: Python<'_>,
        request: &str,
        tokens: u32,
        local: u32,
        hashes: &Bound<'_, PyList>,
    ) -> PyResult<Option<u32>> {
        let started = Instant::now();
        let hashes = inputs::hashes(hashes)?;
        self.run(py, |engine| {
            engine.add_hashes(request, &hashes);
            let hit = engine.lookup(request, tokens, local);
            engine.sample_lookup(started.elapsed().as_secs_f64());
            Ok(match hit {
                Hit::Tokens(tokens) => Some(tokens),
                Hit::AskAgain => None,
            })
        })
    }

    /// vLLM admitted the request; `external` tokens come from us, into `blocks` (per group, from
    /// the first block not held by vLLM on).
    fn admit(&self, py: Python<'_>, request: &str, external: u32, blocks: Vec<Vec<u32>>) -> PyResult<()> {
        self.run(py, |engine| {
            engine.admit(request, external, &blocks);
            Ok(())
        })
    }

    /// Plans a step: offered blocks, vLLM blocks that it hands to requests, and those that it hands
    /// to other connectors. `written_early`: vLLM's model runner writes handed out blocks before it
    /// lets workers wait. Returns the workers' orders, and whether the engine is quiet: it need
    /// not be called again before something else is.
    #[pyo3(signature = (offers, reallocated, foreign=Vec::new(), written_early=false))]
    fn step<'py>(
        &self,
        py: Python<'py>,
        offers: Vec<PyOffer<'py>>,
        reallocated: Vec<Vec<u32>>,
        foreign: Vec<u32>,
        written_early: bool,
    ) -> PyResult<(Bound<'py, PyBytes>, bool)> {
        let offers = offers.into_iter().map(inputs::offer).collect::<PyResult<Vec<_>>>()?;
        let (plan, quiet) = self.run(py, |engine| {
            engine.poll();
            // Before this step's own offloads: their sources belong to the requests that offer
            // them.
            let reallocated = reallocated.iter().flatten().copied();
            if written_early {
                engine.overwrite(reallocated);
            } else {
                engine.reallocate(reallocated);
            }
            engine.hand_to_others(foreign.into_iter());
            for offer in offers {
                apply(engine, offer, Start::AfterStep);
            }
            let plan = engine.take_plan();
            Ok((plan, engine.is_quiet()))
        })?;
        Ok((PyBytes::new(py, &plan), quiet))
    }

    /// vLLM finished a request; `offer`: its last complete blocks.
    fn finish<'py>(
        &self,
        py: Python<'py>,
        request: &str,
        prompt: u32,
        total: u32,
        offer: Option<PyOffer<'py>>,
    ) -> PyResult<()> {
        let offer = offer.map(inputs::offer).transpose()?;
        self.run(py, |engine| {
            engine.poll();
            if let Some(offer) = offer {
                apply(engine, offer, Start::BeforeStep);
            }
            engine.finish(request, prompt, total);
            Ok(())
        })
    }

    /// Loads that every rank reported; `failed` is a subset of `finished`.
    fn loads_ended(&self, py: Python<'_>, finished: Vec<String>, failed: Vec<String>) -> PyResult<()> {
        self.run(py, |engine| {
            engine.poll();
            for id in &finished {
                engine.load_ended(id, failed.contains(id));
            }
            Ok(())
        })
    }

    /// What a request with the wish `forget` has forgotten, once its lookup has answered.
    fn forgotten(&self, py: Python<'_>, request: &str) -> PyResult<Option<ForgetReport>> {
        self.run(py, |engine| Ok(engine.forgotten(request).map(ForgetReport::from)))
    }

    /// Makes everything stored so far worthless, and what is stored from here on this process's
    /// alone, unless `on_reset` is `keep`.
    fn reset(&self, py: Python<'_>) -> PyResult<ResetReport> {
        self.run(py, |engine| Ok(engine.reset().into()))
    }

    /// Events of this step: `StoredRun` and `RemovedRun` objects. `integers`: hashes as vLLM's
    /// 64-bit integers.
    fn take_events(&self, py: Python<'_>, integers: bool) -> PyResult<Vec<Py<PyAny>>> {
        let runs = self.run(py, |engine| Ok(engine.take_events()))?;
        runs.into_iter().map(|run| run_object(py, run, integers)).collect()
    }

    /// Tells subscribers that nothing is to be had from our tiers any more; see `take_events`.
    fn withdraw(&self, py: Python<'_>) -> PyResult<()> {
        self.run(py, |engine| {
            engine.withdraw();
            Ok(())
        })
    }

    /// Every block that a request could have from a tier of ours now: (`dram` or `nvme`, hash,
    /// group).
    fn held(&self, py: Python<'_>) -> PyResult<Vec<(&'static str, Py<PyBytes>, u16)>> {
        let held = self.run(py, |engine| Ok(engine.held()))?;
        let name = |tier: Tier| match tier {
            Tier::Dram => "dram",
            Tier::Nvme => "nvme",
        };
        let row =
            |(tier, key): (Tier, BlockKey)| (name(tier), PyBytes::new(py, key.hash.as_bytes()).unbind(), key.group.0);
        Ok(held.into_iter().map(row).collect())
    }

    /// A step computed this many tokens in so many seconds: what loads are worth, and what
    /// `load_policy: auto` weighs a restore against.
    fn prefilled(&self, py: Python<'_>, tokens: u64, seconds: f64) -> PyResult<()> {
        self.run(py, |engine| {
            engine.prefilled(tokens, seconds);
            Ok(())
        })
    }

    /// Tokens of a request's last admission that come from disk.
    fn disk_tokens(&self, py: Python<'_>, request: &str) -> PyResult<u32> {
        self.run(py, |engine| Ok(engine.disk_tokens(request)))
    }

    /// Events as `take_events` gives them (none without `events`), and what was counted since the
    /// last call, if anything changed.
    fn take_report(
        &self,
        py: Python<'_>,
        events: bool,
        integers: bool,
    ) -> PyResult<(Vec<Py<PyAny>>, Option<EngineStats>)> {
        let (runs, delta) = self.run(py, |engine| {
            let runs = if events { engine.take_events() } else { Vec::new() };
            Ok((runs, engine.take_stats()))
        })?;
        let runs = runs.into_iter().map(|run| run_object(py, run, integers)).collect::<PyResult<_>>()?;
        Ok((runs, delta.map(|delta| EngineStats::new(py, delta)).transpose()?))
    }

    /// Whether vLLM should keep stepping although no request runs.
    fn pending_work(&self, py: Python<'_>) -> PyResult<bool> {
        self.run(py, |engine| Ok(engine.pending_work()))
    }

    /// Gauges: (name, value).
    fn gauges(&self, py: Python<'_>) -> PyResult<Vec<(String, u64)>> {
        self.run(py, |engine| {
            Ok(engine.gauges().all().iter().map(|(name, value)| ((*name).to_owned(), *value)).collect())
        })
    }

    /// Lets go of the pool. Its file is removed without `keep_pool`, and after a reset: no later
    /// start could use it.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let keep = self.config.keep_pool;
        py.detach(|| {
            guarded(|| {
                let useless = |pool: &&Arc<Pool>| !keep || pool.header().is_private();
                let removed = self.lock().pool().filter(useless).map_or(Ok(()), |pool| pool.unlink());
                // Without the engine's lock: the mover needs it to write what is dirty.
                mover::shut(&self.engine);
                drop(self.mover.lock().unwrap_or_else(PoisonError::into_inner).take());
                removed
            })
        })
    }

    /// Lets go of the pool when process `pid` ends: an orphan is sent no more work.
    fn release_with(&self, pid: u32) -> PyResult<super::worker::PyWatch> {
        let engine = Arc::downgrade(&self.engine);
        super::worker::PyWatch::start(pid, move || {
            if let Some(engine) = engine.upgrade() {
                mover::shut(&engine);
            }
        })
    }
}

/// A filled block table for `kvcellar bench lookup`: lookups from Python's `list[bytes]`.
#[pyclass(frozen, name = "WarmTable", module = "kvcellar._native")]
pub(super) struct PyWarmTable {
    table: Mutex<WarmTable>,
}

#[pymethods]
impl PyWarmTable {
    /// A table that holds these blocks.
    #[new]
    fn new(hashes: &Bound<'_, PyList>) -> PyResult<Self> {
        let hashes = inputs::hashes(hashes)?;
        Ok(Self { table: Mutex::new(WarmTable::new(&hashes)) })
    }

    /// Length of the run of known blocks.
    fn lookup(&self, py: Python<'_>, hashes: &Bound<'_, PyList>) -> PyResult<usize> {
        let hashes = inputs::hashes(hashes)?;
        Ok(py.detach(|| self.table.lock().unwrap_or_else(PoisonError::into_inner).lookup(&hashes)))
    }

    /// Takes slots for these new blocks, evicting others, and makes them visible. Returns how many
    /// were evicted.
    fn allocate(&self, py: Python<'_>, hashes: &Bound<'_, PyList>) -> PyResult<usize> {
        let hashes = inputs::hashes(hashes)?;
        Ok(py.detach(|| self.table.lock().unwrap_or_else(PoisonError::into_inner).allocate(&hashes)))
    }
}

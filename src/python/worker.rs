//! `kvcellar._native.CopyWorker`: executes plans for one rank.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::PyConfig;
use super::errors::guarded;
use super::reports::CopyReport;
use kvcellar_block::error::Error;
use kvcellar_engine::gpu::host::HostCopier;
use kvcellar_engine::gpu::sides::Sides;
use kvcellar_engine::gpu::views::{GroupRuns, LayerView};
use kvcellar_engine::gpu::worker::{CopyStats, CopyWorker};
use kvcellar_engine::gpu::{Answers, ComputeStream, Copier};
use kvcellar_engine::pool::watch::Watch;

/// The copy worker of one rank.
#[pyclass(frozen, name = "CopyWorker", module = "kvcellar._native")]
pub(super) struct PyCopyWorker {
    worker: Arc<Mutex<CopyWorker>>,
    groups: Arc<Vec<GroupRuns>>,
    near_node: Option<u32>,
}

impl PyCopyWorker {
    fn lock(&self) -> MutexGuard<'_, CopyWorker> {
        // A panic in an earlier call was reported then.
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The worker, told on which stream vLLM computes.
    fn on(&self, stream: Option<u64>) -> MutexGuard<'_, CopyWorker> {
        let mut worker = self.lock();
        worker.set_compute(stream.map(ComputeStream));
        worker
    }
}

/// How a KV cache in GPU memory is copied.
#[cfg(feature = "cuda")]
struct Gpu {
    options: kvcellar_engine::gpu::cuda::copier::CopierOptions,
    near_node: Option<u32>,
}

#[cfg(feature = "cuda")]
impl Gpu {
    /// Sees at once whether there is a driver that serves this device.
    fn open(device: i32, nvrtc: &[PathBuf]) -> kvcellar_block::error::Result<Self> {
        use kvcellar_engine::gpu::cuda::{calibration, copier, device::Device, driver::Refused};

        let opened = Device::open(device)?;
        let facts = opened.facts().map_err(Refused::into_error)?;
        // Now: vLLM has allocated its KV cache and computes nothing yet.
        let found = calibration::of_device(&opened, nvrtc).map_err(Refused::into_error)?;
        Ok(Self { options: copier::CopierOptions::of(device, found), near_node: facts.near_node })
    }

    fn near_node(&self) -> Option<u32> {
        self.near_node
    }

    fn copier(&self, sides: Sides, answers: Arc<dyn Answers>) -> kvcellar_block::error::Result<Box<dyn Copier>> {
        Ok(Box::new(kvcellar_engine::gpu::cuda::copier::CudaCopier::start(sides, answers, &self.options)?))
    }
}

/// In a build without CUDA there is none.
#[cfg(not(feature = "cuda"))]
enum Gpu {}

#[cfg(not(feature = "cuda"))]
impl Gpu {
    fn open(_device: i32, _nvrtc: &[PathBuf]) -> kvcellar_block::error::Result<Self> {
        Err(Error::Unsupported {
            what: "a KV cache in GPU memory".to_owned(),
            why: "this build was made without the feature `cuda`".to_owned(),
            remedy: "Install a wheel that has it, or build with it".to_owned(),
        })
    }

    fn near_node(&self) -> Option<u32> {
        match *self {}
    }

    fn copier(&self, _sides: Sides, _answers: Arc<dyn Answers>) -> kvcellar_block::error::Result<Box<dyn Copier>> {
        match *self {}
    }
}

#[pymethods]
impl PyCopyWorker {
    /// `views`: JSON, per group a list of layer views. The tensors they describe must stay
    /// allocated until `release`. `device`: the GPU whose memory they are in, as torch numbers it;
    /// none: host memory. `nvrtc`: files that may be NVRTC.
    #[new]
    #[pyo3(signature = (config, rank, views, device=None, nvrtc=Vec::new()))]
    fn new(config: &PyConfig, rank: usize, views: &str, device: Option<i32>, nvrtc: Vec<PathBuf>) -> PyResult<Self> {
        guarded(|| {
            let views: Vec<Vec<LayerView>> = serde_json::from_str(views)
                .map_err(|error| Error::config("views", error.to_string(), "This is a bug in the connector"))?;
            let groups = views.iter().enumerate().map(|(group, layers)| GroupRuns::resolve(group, layers));
            let groups = Arc::new(groups.collect::<kvcellar_block::error::Result<Vec<_>>>()?);
            let verify_loads = config.inner.verify_loads;
            let threads = config.inner.copy_threads.unwrap_or_else(default_threads);
            let (held, on_gpu) = (Arc::clone(&groups), device.map(|device| Gpu::open(device, &nvrtc)).transpose()?);
            let near_node = on_gpu.as_ref().and_then(Gpu::near_node);
            let worker = CopyWorker::new(
                rank,
                verify_loads,
                Box::new(move |pool, answers, guard| {
                    // SAFETY: the connector keeps vLLM's KV tensors alive (it holds references to
                    // them) until it has called `release`, which ends the copier.
                    let sides = unsafe { Sides::new(pool, Arc::clone(&held), rank, verify_loads, guard) };
                    match &on_gpu {
                        Some(gpu) => gpu.copier(sides, answers),
                        None => Ok(Box::new(HostCopier::start(sides, &answers, threads)?)),
                    }
                }),
            );
            Ok(Self { worker: Arc::new(Mutex::new(worker)), groups, near_node })
        })
    }

    /// Per group: bytes of one block on this rank.
    #[getter]
    fn block_bytes(&self) -> Vec<u64> {
        self.groups.iter().map(GroupRuns::block_bytes).collect()
    }

    /// The memory node next to the GPU, where that is known.
    #[getter]
    fn near_node(&self) -> Option<u32> {
        self.near_node
    }

    /// Maps the pool a ticket names.
    fn attach(&self, py: Python<'_>, ticket: &str) -> PyResult<()> {
        py.detach(|| {
            guarded(|| {
                let ticket =
                    serde_json::from_str(ticket).map_err(|error| Error::lost("pool ticket", error.to_string()))?;
                self.lock().attach(&ticket)
            })
        })
    }

    /// Before the forward pass: see the plan's parts. `stream`: the handle of the stream on which
    /// vLLM computes, on a GPU.
    #[pyo3(signature = (plan, stream=None))]
    fn begin_step(&self, py: Python<'_>, plan: &[u8], stream: Option<u64>) -> PyResult<()> {
        let plan = plan.to_vec();
        py.detach(|| guarded(|| self.on(stream).begin_step(&plan)))
    }

    /// Starts the plan's loads.
    #[pyo3(signature = (stream=None))]
    fn start_loads(&self, py: Python<'_>, stream: Option<u64>) -> PyResult<()> {
        py.detach(|| {
            guarded(|| {
                self.on(stream).start_loads();
                Ok(())
            })
        })
    }

    /// After the forward pass: starts the offloads of what it computed.
    #[pyo3(signature = (stream=None))]
    fn finish_step(&self, py: Python<'_>, stream: Option<u64>) -> PyResult<()> {
        py.detach(|| {
            guarded(|| {
                self.on(stream).finish_step();
                Ok(())
            })
        })
    }

    /// Copies submitted and not answered.
    fn in_flight(&self, py: Python<'_>) -> PyResult<usize> {
        py.detach(|| guarded(|| Ok(self.lock().in_flight())))
    }

    /// Loads that ended since the last call: (all, failed).
    fn take_results(&self, py: Python<'_>) -> PyResult<(Vec<String>, Vec<String>)> {
        py.detach(|| {
            guarded(|| {
                let results = self.lock().take_results();
                Ok((results.finished, results.failed))
            })
        })
    }

    /// Work done since the last call, or `None`.
    fn take_stats(&self, py: Python<'_>) -> PyResult<Option<CopyReport>> {
        py.detach(|| {
            guarded(|| {
                let stats = self.lock().take_stats();
                Ok((stats != CopyStats::default()).then(|| stats.into()))
            })
        })
    }

    /// What people should know of the copier, once.
    fn take_notes(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        py.detach(|| guarded(|| Ok(self.lock().take_notes())))
    }

    /// Gives the idle hasher up to `seconds` to finish, carries out what is in flight, then unmaps
    /// the pool.
    fn release(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        py.detach(|| {
            guarded(|| {
                let deadline = Instant::now() + Duration::try_from_secs_f64(seconds).unwrap_or_default();
                while Instant::now() < deadline && self.lock().unhashed() > 0 {
                    thread::sleep(Duration::from_millis(1));
                }
                self.lock().release();
                Ok(())
            })
        })
    }

    /// Lets go of the pool when process `pid` ends: an orphan is sent no more work.
    fn release_with(&self, pid: u32) -> PyResult<PyWatch> {
        let worker = Arc::downgrade(&self.worker);
        PyWatch::start(pid, move || {
            if let Some(worker) = worker.upgrade() {
                worker.lock().unwrap_or_else(PoisonError::into_inner).release();
            }
        })
    }
}

/// On CPU the cores belong to the model: one copying thread saturates most of a memory channel;
/// more only where cores abound.
fn default_threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).clamp(1, 4))
}

/// Watches a process for as long as this object lives.
#[pyclass(frozen, name = "Watch", module = "kvcellar._native")]
pub(super) struct PyWatch {
    _watch: Watch,
}

impl PyWatch {
    pub(super) fn start(pid: u32, gone: impl FnOnce() + Send + 'static) -> PyResult<Self> {
        guarded(|| Ok(Self { _watch: Watch::start(pid, gone)? }))
    }
}

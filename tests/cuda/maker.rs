//! The CUDA copier for the suite of all copiers.

use std::any::Any;
use std::sync::Arc;

use kvcellar_engine::gpu::cuda::calibration::Calibration;
use kvcellar_engine::gpu::cuda::copier::{CopierOptions, CudaCopier};
use kvcellar_engine::gpu::cuda::device::Device;
use kvcellar_engine::gpu::views::GroupRuns;
use kvcellar_engine::gpu::{Answers, Copier};

use kvcellar_testkit::copies::scene::{Maker, Side};
use kvcellar_testkit::stub_cuda::{self, Stub};

pub(crate) struct Cuda;

/// Tests that load into blocks which they also offload, without a fence: they look at answers, not
/// at bytes.
const CARELESS: [&str; 2] = ["submitting_does_not_wait", "loads_overtake_queued_offloads"];

/// The stub for one test of the suite; at its end the checker has found nothing.
struct Turn {
    stub: Stub,
    checked: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.checked && !std::thread::panicking() {
            self.stub.is_clean();
        }
    }
}

impl Maker for Cuda {
    fn turn(test: &str) -> Box<dyn Any> {
        let stub = Stub::take(11);
        if test == "loads_overtake_queued_offloads" {
            // The two streams are independent of each other: only on an immediate device do answers
            // show what was started first.
            stub.eager();
        }
        Box::new(Turn { stub, checked: !CARELESS.contains(&test) })
    }

    fn make(side: Side, answers: Arc<dyn Answers>, _threads: usize) -> Box<dyn Copier> {
        adopt(&side.groups);
        Box::new(CudaCopier::start(side.host(), answers, &assumed()).expect("the stub's device"))
    }
}

/// Without calibration: it has its own test.
pub(crate) fn assumed() -> CopierOptions {
    let device = Device::open(0).expect("the stub's device");
    CopierOptions::of(0, Calibration::assumed(&device))
}

/// With a kernel that moves fragments of up to these sizes.
pub(crate) fn with_kernel(gather_below: u64, stage_below: u64) -> CopierOptions {
    let device = Device::open(0).expect("the stub's device");
    let calibration = Calibration::with_kernel(&device, b"an image", gather_below, stage_below).expect("loaded");
    CopierOptions::of(0, calibration)
}

/// A KV cache's memory counts as the device's.
pub(crate) fn adopt(groups: &[GroupRuns]) {
    let pieces = groups
        .iter()
        .filter(|group| group.block_bytes() > 0)
        .flat_map(|group| (0..group.blocks() as u32).flat_map(|block| group.pieces(block).expect("a block")));
    let (start, end) = pieces.fold((u64::MAX, 0), |(start, end), (at, len)| (start.min(at), end.max(at + len as u64)));
    stub_cuda::adopt(start, (end - start) as usize);
}

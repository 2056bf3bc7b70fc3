//! The gather kernel's way through the copier, and calibration. The stub runs no kernel: it does what `cuda/gather.cu` says.

use kvcellar::block::plan::{BlockCopy, StepPlan};
use kvcellar::gpu::cuda::calibration::{self, Calibration};
use kvcellar::gpu::cuda::copier::Options;
use kvcellar::gpu::cuda::device::Device;

use crate::cache::Shape;
use crate::ledger::until;
use crate::scene::Scene;
use crate::stub::Stub;
use crate::vllm::{Vllm, load};

#[test]
fn small_fragments_are_loaded_by_the_kernel() {
    let stub = Stub::take(1);
    stub.strict();
    let scene = Scene::new(&[(Shape { page: 64, ..Shape::plain(5) }, None)], 8);
    let device = Device::open(0).expect("the stub's device");
    let calibration = Calibration::with_kernel(&device, b"an image", 4096).expect("loaded");
    let options = Options { calibration: Some(calibration), ..Options::of(0, Vec::new()) };
    let mut vllm = Vllm::new(&stub, &scene, options);
    let stores: Vec<BlockCopy> = (0..4).map(|slot| scene.begin(slot, 0, slot)).collect();
    let writes: Vec<(u32, u8)> = (0..4).map(|block| (block, 20 + block as u8)).collect();
    vllm.step(&StepPlan { stores_after: stores.clone(), ..StepPlan::default() }, &[], &writes);
    for copy in &stores {
        vllm.wait_for(copy);
        scene.line(copy.slot).publish();
    }
    assert_eq!(stub.calls("cuLaunchKernel"), 0, "an offload went by the kernel");
    // More loads than there are tables.
    for round in 0..20 {
        let copies: Vec<BlockCopy> =
            stores.iter().map(|copy| BlockCopy { block: 4 + (copy.slot + round) % 4, ..*copy }).collect();
        let loads = vec![load(&round.to_string(), &copies)];
        vllm.step(&StepPlan { loads, ..StepPlan::default() }, &[], &[]);
        until("the loads end", || vllm.worker.take_results().finished == [round.to_string()]);
        for copy in &copies {
            assert!(vllm.block_is(copy.block, 20 + copy.slot as u8));
        }
    }
    assert!(stub.calls("cuLaunchKernel") >= 20);
    drop(vllm);
    stub.is_clean();
}

#[test]
fn calibration_measures_what_is_there_and_gives_its_memory_back() {
    let stub = Stub::take(2);
    let device = Device::open(0).expect("the stub's device");
    let found = calibration::of_device(&device, &[]).expect("a device that copies");
    assert_eq!(found.rates.len(), 5);
    assert!(found.rates.iter().all(|(_, [batch, each, gather])| *batch > 0.0 && *each > 0.0 && *gather == 0.0));
    assert!(found.seconds < 1.0, "{} s", found.seconds);
    assert!(found.to_string().contains("no kernel"), "{found}");
    assert_eq!(stub.calls("cuMemAlloc_v2"), stub.calls("cuMemFree_v2"));
    assert_eq!(stub.calls("cuMemHostAlloc"), stub.calls("cuMemFreeHost"));
    stub.is_clean();
}

/// The stub's rates mean nothing: the benchmark runs, gives its memory back, and reports every size both ways.
#[test]
fn the_benchmark_runs_over_the_stub() {
    use kvcellar::cli::bench_dma::{Options, measure};
    let stub = Stub::take(4);
    stub.eager();
    stub.strict();
    let options = Options { device: 0, mib: 8, repetitions: 1, nvrtc: Vec::new(), json: true };
    measure(&options).expect("the stub's device");
    assert!(measure(&Options { mib: 9, ..options }).is_err());
    assert_eq!(stub.calls("cuMemAlloc_v2"), stub.calls("cuMemFree_v2"));
    assert_eq!(stub.calls("cuMemHostAlloc"), stub.calls("cuMemFreeHost"));
    stub.is_clean();
}

#[test]
fn without_memory_to_measure_with_the_engines_are_used() {
    let stub = Stub::take(3);
    stub.fail("cuMemAlloc_v2", 0, 1, 2);
    let device = Device::open(0).expect("the stub's device");
    let found = calibration::of_device(&device, &[]).expect("a device that copies");
    assert_eq!(found.thresholds.gather_below, 0);
    assert_eq!(stub.calls("cuMemHostAlloc"), stub.calls("cuMemFreeHost"));
    stub.is_clean();
}

//! The gather kernel's way through the copier, and calibration. The stub runs no kernel: it does
//! what `cuda/gather.cu` says.

use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_engine::gpu::cuda::calibration;
use kvcellar_engine::gpu::cuda::device::Device;
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::with_kernel;
use crate::vllm::{Vllm, load};
use kvcellar_testkit::copies::cache::Shape;
use kvcellar_testkit::copies::ledger::until;
use kvcellar_testkit::copies::scene::Scene;
use kvcellar_testkit::stub_cuda::Stub;

#[test]
fn small_fragments_are_loaded_by_the_kernel() {
    let stub = Stub::take(1);
    stub.strict();
    let scene = Scene::new(&[(Shape { page: 64, ..Shape::plain(5) }, None)], 8);
    let mut vllm = Vllm::new(&stub, &scene, with_kernel(4096, 0));
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
    let by_engines = |[batch, each, kernel]: [f64; 3]| batch > 0.0 && each > 0.0 && kernel == 0.0;
    assert!(found.rates.iter().all(|rates| by_engines(rates.up) && by_engines(rates.down)));
    assert!(found.to_string().contains("no kernel"), "{found}");
    assert_eq!(stub.calls("cuMemAlloc_v2"), stub.calls("cuMemFree_v2"));
    assert_eq!(stub.calls("cuMemHostRegister_v2"), stub.calls("cuMemHostUnregister"));
    stub.is_clean();
}

/// Fragments of five layers, packed on their way out: into several buffers, and into each again and
/// again.
#[test]
fn small_fragments_are_offloaded_by_way_of_device_memory() {
    let stub = Stub::take(6);
    stub.strict();
    let scene = Scene::new(&[(Shape { page: 128 << 10, blocks: 16, ..Shape::plain(5) }, None)], 16);
    let mut vllm = Vllm::new(&stub, &scene, with_kernel(0, 1 << 20));
    for round in 0..4 {
        let stores: Vec<BlockCopy> = (0..16).map(|slot| scene.begin(slot, 0, (slot * 5 + round) % 16)).collect();
        let writes: Vec<(u32, u8)> = (0..16).map(|block| (block, (16 * round + block + 1) as u8)).collect();
        vllm.step(&StepPlan { stores_after: stores.clone(), ..StepPlan::default() }, &[], &writes);
        for copy in &stores {
            assert_eq!(vllm.wait_for(copy), Fill::Done);
            assert!(vllm.slot_is(copy.slot, (16 * round + copy.block + 1) as u8));
        }
        (0..16).for_each(|slot| vllm.touch_slot(slot, true));
        (0..16).for_each(|slot| scene.line(slot).clear());
    }
    let (kernels, singles) = (stub.calls("cuLaunchKernel"), stub.calls("cuMemcpyDtoHAsync_v2"));
    assert!(kernels >= 4 * 3, "10 MiB a round went in {kernels} kernels");
    assert_eq!(singles, 0);
    drop(vllm);
    assert_eq!(stub.calls("cuMemAlloc_v2"), stub.calls("cuMemFree_v2"));
    stub.is_clean();
}

#[test]
fn without_memory_for_packing_the_engines_are_used_and_it_is_said() {
    let stub = Stub::take(7);
    let scene = Scene::new(&[(Shape { page: 64, ..Shape::plain(5) }, None)], 8);
    stub.fail("cuMemAlloc_v2", 0, 1, 2);
    let mut vllm = Vllm::new(&stub, &scene, with_kernel(0, 4096));
    let copy = scene.begin(0, 0, 3);
    vllm.step(&StepPlan { stores_after: vec![copy], ..StepPlan::default() }, &[], &[(3, 7)]);
    assert_eq!(vllm.wait_for(&copy), Fill::Done);
    assert!(vllm.slot_is(0, 7));
    assert_eq!(stub.calls("cuLaunchKernel"), 0);
    assert!(vllm.worker.take_notes().iter().any(|note| note.contains("not packed")));
    drop(vllm);
    stub.is_clean();
}

/// One way that the driver refuses is not used; the others are.
#[test]
fn a_way_that_is_refused_is_left_out() {
    let stub = Stub::take(8);
    stub.fail("cuMemcpyBatchAsync", 0, i32::MAX, 1);
    let device = Device::open(0).expect("the stub's device");
    let found = calibration::of_device(&device, &[]).expect("a device that copies");
    assert!(!found.thresholds.batch);
    assert!(found.rates.iter().all(|rates| rates.up[1] > 0.0 && rates.down[1] > 0.0));
    assert!(found.to_string().contains("Batch for 4 KiB: cuMemcpyBatchAsync answered"), "{found}");
    drop(device);
    stub.is_clean();
}

#[test]
fn without_memory_to_measure_with_the_engines_are_used() {
    let stub = Stub::take(3);
    stub.fail("cuMemAlloc_v2", 0, 1, 2);
    let device = Device::open(0).expect("the stub's device");
    let found = calibration::of_device(&device, &[]).expect("a device that copies");
    assert!(found.rates.is_empty() && found.to_string().contains("nothing to measure with"), "{found}");
    assert_eq!(stub.calls("cuMemHostRegister_v2"), stub.calls("cuMemHostUnregister"));
    stub.is_clean();
}

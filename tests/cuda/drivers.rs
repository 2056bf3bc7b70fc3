//! Drivers that are not there, too old, without a device, or without a function: values with a
//! remedy. Each in a process of its own, for a process loads its driver once.

use std::path::Path;
use std::process::Command;

use kvcellar_block::plan::{BlockCopy, StepPlan};
use kvcellar_engine::gpu::cuda::device::Device;
use kvcellar_engine::gpu::cuda::driver::Driver;
use kvcellar_engine::pool::slot_table::Fill;

use crate::maker::assumed;
use crate::vllm::{Vllm, load};
use kvcellar_testkit::copies::ledger::until;
use kvcellar_testkit::copies::scene::Scene;
use kvcellar_testkit::stub_cuda::{self, Stub};

/// Runs one ignored test of this binary in a process of its own, with these libraries before all
/// others. What it said.
fn child(test: &str, library: Option<&Path>, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().expect("this binary"));
    command.args(["--ignored", "--exact", test, "--nocapture", "--test-threads=1"]).envs(environment.iter().copied());
    if let Some(library) = library {
        command.env("LD_LIBRARY_PATH", library.parent().expect("a folder")).env(stub_cuda::LIBRARY, library);
    }
    let output = command.output().expect("a process");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{test}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
#[ignore = "run by the tests below"]
fn says_what_it_finds() {
    match Driver::get().and_then(|driver| Device::open(0).map(|device| (driver, device))) {
        Ok((driver, device)) => {
            let facts = device.facts().expect("facts");
            let (version, node) = (driver.version(), facts.near_node);
            println!("found {} for CUDA {version}, batches {}, node {node:?}", facts.name, driver.batches());
        }
        Err(error) => println!("refused: {error}"),
    }
}

/// What a process with this driver says.
fn said(without: &[&str], environment: &[(&str, &str)]) -> String {
    child("drivers::says_what_it_finds", Some(&stub_cuda::build(without)), environment)
}

#[test]
fn a_whole_driver_is_found_by_the_loader() {
    let text = said(&[], &[]);
    assert!(text.contains("found Stub for CUDA 12.8, batches true, node None"), "{text}");
}

#[test]
fn the_memory_node_next_to_a_device_is_known_where_the_driver_knows_it() {
    for (told, known) in [("3", "node Some(3)"), ("-1", "node None")] {
        let text = said(&[], &[("KVCELLAR_STUB_NODE", told)]);
        assert!(text.contains(known), "{told}: {text}");
    }
}

#[test]
fn no_driver_is_an_error_with_a_remedy() {
    // Nothing of a driver that this machine may have.
    let text = child("drivers::says_what_it_finds", None, &[]);
    let found = text.contains("found ");
    assert!(found || (text.contains("refused: ") && text.contains("Install the NVIDIA driver")), "{text}");
}

#[test]
fn old_damaged_and_empty_drivers_are_errors_with_a_remedy() {
    for (environment, why, remedy) in [
        (("KVCELLAR_STUB_VERSION", "11040"), "CUDA 11.4", "Update the NVIDIA driver"),
        (("KVCELLAR_STUB_DEVICES", "0"), "cuDeviceGet answered", "kernel log"),
        (("KVCELLAR_STUB_INIT", "100"), "CUDA_ERROR_NO_DEVICE", "Give this process a GPU"),
        (("KVCELLAR_STUB_INIT", "803"), "an error without a name (803)", "different versions"),
    ] {
        let text = said(&[], &[environment]);
        assert!(text.contains("refused: ") && text.contains(why) && text.contains(remedy), "{environment:?}: {text}");
    }
    let text = said(&["EVENTS"], &[]);
    assert!(text.contains("has no cuEventCreate") && text.contains("Update the NVIDIA driver"), "{text}");
}

#[test]
#[ignore = "run by the test below"]
fn copies_there_and_back() {
    let stub = Stub::take(1);
    stub.strict();
    let scene = Scene::simple(4);
    let mut vllm = Vllm::new(&stub, &scene, assumed());
    let copies = [0, 1].map(|slot| scene.begin(slot, 0, slot));
    vllm.step(&StepPlan { stores_after: copies.to_vec(), ..StepPlan::default() }, &[], &[(0, 5), (1, 6)]);
    assert!(copies.iter().all(|copy| vllm.wait_for(copy) == Fill::Done));
    copies.iter().for_each(|copy| scene.line(copy.slot).publish());
    let back = copies.map(|copy| BlockCopy { block: copy.block + 4, ..copy });
    vllm.step(&StepPlan { loads: vec![load("a", &back)], ..StepPlan::default() }, &[], &[]);
    until("the load ends", || vllm.worker.take_results().finished == ["a"]);
    assert!(vllm.block_is(4, 5) && vllm.block_is(5, 6));
    drop(vllm);
    stub.is_clean();
    println!("copied in {} calls", stub.calls("cuMemcpyDtoHAsync_v2") + stub.calls("cuMemcpyHtoDAsync_v2"));
}

#[test]
fn without_batches_and_modules_each_fragment_is_a_call() {
    let text = child("drivers::copies_there_and_back", Some(&stub_cuda::build(&["BATCHES", "MODULES"])), &[]);
    // Two blocks of three layers, both ways.
    assert!(text.contains("copied in 12 calls"), "{text}");
}

//! Calls that the driver refuses: everything is answered, nothing is given back too early, and the
//! rest goes on.

use crate::histories::{History, scene};
use crate::vllm::Vllm;
use kvcellar_testkit::random::Random;
use kvcellar_testkit::stub_cuda::Stub;

/// A device that is gone answers these too.
const ALSO_GONE: [&str; 2] = ["cuStreamQuery", "cuStreamSynchronize"];

/// One history with a function that fails; for good when the device is gone. How many orders
/// failed, and how many loads worked.
fn play(seed: u64, name: &str, skip: i32, gone: bool, code: i32) -> (u32, u32) {
    let stub = Stub::take(seed);
    let scene = scene();
    let mut history = History::new(Vllm::pinned(&stub, &scene), Random::new(seed));
    stub.fail(name, skip, if gone { i32::MAX } else { 1 }, code);
    ALSO_GONE.iter().filter(|_| gone).for_each(|name| stub.fail(name, 0, i32::MAX, code));
    for _ in 0..40 {
        history.step();
    }
    history.end();
    stub.finish();
    assert_eq!(history.mismatches, 0, "{name} after {skip}");
    let counts = (history.failed, history.loaded);
    let notes = history.vllm.worker.take_notes();
    drop(history);
    if !gone {
        let (count, first) = stub.wrongs();
        assert_eq!(count, 0, "{name} after {skip}: {first}");
    }
    let told = notes.iter().any(|note| note.contains("could not be started") || note.contains("no longer copies"));
    // A mark that cannot be made fails its step's orders on vLLM's own thread.
    let marks = ["cuEventRecord", "cuEventCreate", "cuCtxPushCurrent_v2"].contains(&name);
    assert!(counts.0 == 0 || told || marks, "{name}: {notes:?}");
    let retired = notes.iter().any(|note| note.contains("no longer copies"));
    assert!(retired == gone || (gone && marks), "{name}: {notes:?}");
    counts
}

#[test]
fn a_copy_that_is_refused_fails_its_job_alone() {
    let mut random = Random::of_test();
    for name in ["cuMemcpyBatchAsync", "cuMemcpyDtoHAsync_v2"] {
        for skip in [0, 3] {
            let (failed, loaded) = play(random.next(), name, skip, false, 1);
            assert!(loaded > 0, "{name}: nothing went on after the failure");
            assert!(failed > 0 || name == "cuMemcpyDtoHAsync_v2", "{name}: nothing failed");
        }
    }
}

#[test]
fn whatever_is_refused_once_every_order_is_answered_and_the_rest_goes_on() {
    let mut random = Random::of_test();
    for name in ["cuEventRecord", "cuStreamWaitEvent", "cuEventCreate", "cuEventQuery", "cuCtxPushCurrent_v2"] {
        for skip in [0, 7] {
            let (_, loaded) = play(random.next(), name, skip, false, 2);
            assert!(loaded > 0, "{name} after {skip}: nothing went on after the failure");
        }
    }
}

/// A device that is gone answers every call with the same error. Its copies are gone with it, which
/// the checker does not know.
#[test]
fn a_device_that_is_gone_fails_everything_and_stops_nobody() {
    let mut random = Random::of_test();
    for name in ["cuEventQuery", "cuStreamWaitEvent", "cuEventRecord", "cuMemcpyBatchAsync"] {
        let (failed, _) = play(random.next(), name, 9, true, 700);
        assert!(failed > 0, "{name}: nothing failed");
    }
}

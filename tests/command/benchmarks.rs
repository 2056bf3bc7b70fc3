//! Benchmarks of what this machine may not have.

use kvcellar_testkit::stub_cuda::Stub;

/// The stub's rates mean nothing: the benchmark runs, gives its memory back, and reports every size
/// both ways.
#[test]
fn the_benchmark_runs_over_the_stub() {
    use kvcellar_bench::dma::{DmaBench, measure};
    let stub = Stub::take(4);
    stub.eager();
    stub.strict();
    let options = DmaBench { device: 0, mib: 8, repetitions: 1, nvrtc: Vec::new(), json: true };
    measure(&options).expect("the stub's device");
    assert!(measure(&DmaBench { mib: 9, ..options }).is_err());
    assert_eq!(stub.calls("cuMemAlloc_v2"), stub.calls("cuMemFree_v2"));
    assert_eq!(stub.calls("cuMemHostRegister_v2"), stub.calls("cuMemHostUnregister"));
    stub.is_clean();
}

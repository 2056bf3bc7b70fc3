//! Where the kernel refuses something, `kvcellar doctor` says so.

use std::path::Path;

use kvcellar_engine::nvme::probe;
use kvcellar_testkit::confined::{forbid, in_own_process};

#[test]
fn a_refused_ring_is_told_with_a_remedy() {
    in_own_process("refusal::a_refused_ring_is_told_with_a_remedy", || {
        forbid(libc::SYS_io_uring_setup);
        let why = probe::refusal().expect("a reason");
        let findings = kvcellar_command::doctor::machine::examine(Path::new("/dev/shm"));
        let ring = findings.iter().find(|finding| finding.name == "io_uring").expect("a line about the ring");
        assert!(ring.found.contains(&why) && ring.remedy.is_some(), "{ring:?}");
    });
}

//! Any bytes as a snapshot: no panic, and what is accepted is exactly what its own entries are
//! written as.
#![no_main]

use kvcellar_engine::nvme::snapshot;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok((subject, entries, _)) = snapshot::decode(bytes) {
        let (again, sum) = snapshot::encode(&subject, &entries);
        let (found, listed, found_sum) = snapshot::decode(&again).expect("just encoded");
        assert_eq!((found, listed, found_sum), (subject, entries, sum));
    }
});

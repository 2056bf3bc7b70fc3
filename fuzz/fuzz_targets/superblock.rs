//! Any bytes as a superblock: no panic, and what is accepted survives a round trip.
#![no_main]

use kvcellar_engine::nvme::superblock::Superblock;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(block) = Superblock::decode(bytes) {
        let again = block.encode().expect("it fitted before");
        assert_eq!(Superblock::decode(&again).expect("just encoded"), block);
    }
});

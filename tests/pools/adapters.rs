//! Blocks computed with a LoRA adapter belong to what the adapter consists of, not to its name.

use kvcellar_block::AdapterId;

use crate::place::{Place, Purpose};
use crate::stock::Stock;

fn adapter(content: u8) -> Option<AdapterId> {
    AdapterId::new(&[content; 16])
}

#[test]
fn adapters_of_one_name_and_equal_hashes_never_share_a_block() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    for content in [adapter(1), adapter(2), None] {
        stock.adapter = content;
        assert_eq!(stock.hit(&[1, 2]), 0, "somebody else's blocks with {content:?}");
        stock.store(&[1, 2], |_| true);
        assert_eq!(stock.hit(&[1, 2]), 32, "the own blocks with {content:?}");
    }
    assert_eq!(stock.engine.held().len(), 6, "three contents of two blocks each");
}

#[test]
fn the_same_adapter_finds_its_blocks_after_a_restart_and_a_retrained_one_does_not() {
    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    stock.adapter = adapter(1);
    stock.store(&[1, 2, 3], |_| true);
    drop(stock);
    let mut stock = Stock::of(place.open(&Purpose::small()));
    assert_eq!(stock.adopted, 3);
    for (content, tokens) in [(adapter(2), 0), (None, 0), (adapter(1), 48)] {
        stock.adapter = content;
        assert_eq!(stock.hit(&[1, 2, 3]), tokens, "{content:?}");
    }
}

#[test]
fn events_of_an_adapters_blocks_carry_hashes_of_their_own_whose_parents_agree() {
    use kvcellar_engine::event_log::Run;

    let place = Place::new();
    let mut stock = Stock::of(place.open(&Purpose::small()));
    let mut announced = Vec::new();
    for content in [None, adapter(1)] {
        stock.adapter = content;
        stock.store(&[1, 2], |_| true);
        for run in stock.engine.take_events() {
            let Run::Stored { hashes, parent, lora, .. } = run else { panic!("nothing was removed") };
            assert!(parent.is_none() && hashes.len() == 2, "one chain from its first block");
            announced.push((hashes, lora));
        }
    }
    let [(plain, nobody), (own, name)] = &announced[..] else { panic!("two chains") };
    assert!(plain.iter().all(|hash| !own.contains(hash)));
    assert_eq!((&**nobody, &**name), ("", "sql"));
}

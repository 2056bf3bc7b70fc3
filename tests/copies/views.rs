//! Layouts that the suite's caches cannot show: layers that touch in their first block only.

use kvcellar_engine::gpu::views::{GroupRuns, LayerView};

fn view(address: u64, stride_bytes: u64) -> LayerView {
    LayerView { address, stride_bytes, page_bytes: 50, pages_per_block: 1, pages: 3 }
}

#[test]
fn layers_of_different_strides_stay_apart() {
    let group = GroupRuns::resolve(0, &[view(1000, 500), view(1050, 100)]).expect("a layout that is supported");
    let pieces = |block| group.pieces(block).expect("a block").collect::<Vec<_>>();
    let bytes = |block| pieces(block).iter().flat_map(|(at, len)| *at..*at + *len as u64).collect::<Vec<_>>();
    assert_eq!(bytes(0), (1000..1100).collect::<Vec<_>>());
    assert_eq!(bytes(2), (2000..2050).chain(1250..1300).collect::<Vec<_>>());
}

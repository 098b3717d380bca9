//! Images that stand unpacked without their layers.

use super::*;

/// As on a node that discards unpacked layers: what stands unpacked is there, and is not brought again.
#[test]
fn an_image_that_stands_unpacked_without_its_layers_is_there() {
    let (mut bench, name) = (Bench::new(), "r.test/x:1");
    bench.up("a", vec![image(1, &[name], true)]);
    bench.waits("p", "b", name);
    bench.decide();
    bench.transfer("job-1", done());
    assert_eq!(woken(&bench.decide()).len(), 1);
    let tells = |unpacked: bool| {
        let mut spared = image(1, &[name], false);
        spared.manifests[0].unpacked = unpacked;
        Event::Fleet(FleetEvent::Delta { node: "b".into(), upserted: vec![spared], removed: vec![] })
    };
    bench.on(tells(true));
    for seconds in [31, 60, 600] {
        let actions = bench.pass(seconds);
        assert_eq!(
            (woken(&actions).len(), created(&actions).len()),
            (1, 0),
            "{seconds} s later it still waits"
        );
    }
    bench.on(tells(false));
    let actions = bench.decide();
    assert_eq!((woken(&actions).len(), created(&actions).len()), (0, 1), "its snapshots are gone");
}

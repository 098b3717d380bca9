//! What a job's condition tells of its transfer.

use super::*;

#[test]
fn who_lied_to_an_earlier_attempt_is_named_to_the_end() {
    let failed = |reason, lying_nodes: &[&str]| TransferEvent::Failed {
        reason,
        message: "the disk is full".into(),
        retryable: true,
        lying_nodes: lying_nodes.iter().map(ToString::to_string).collect(),
    };
    for ends_well in [true, false] {
        let mut bench = Bench::new();
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b", "backoffLimit": 2}), false);
        bench.decide();
        bench.transfer(&uid, failed("DiskFull", &["n3"]));
        bench.decide();
        assert_eq!(bench.reason(&uid), (Phase::Transferring, "Retrying".into()));
        let names = |bench: &Bench, nodes: &str| {
            let message = bench.message(&uid);
            assert!(
                message.contains(&format!("wrong bytes came from {nodes}, and were thrown")),
                "{message}"
            );
        };
        names(&bench, "n3");
        bench.pass(5);
        bench.transfer(&uid, failed("NoSource", &["n2"]));
        bench.pass(5);
        bench.transfer(&uid, if ends_well { done() } else { failed("DiskFull", &[]) });
        bench.decide();
        assert_eq!(bench.reason(&uid).0, if ends_well { Phase::Imported } else { Phase::Failed });
        names(&bench, "n2, n3");
    }
}

#[test]
fn unpacking_is_told_once_and_only_where_it_lasts() {
    for lasts in [4, 60] {
        let mut bench = Bench::new();
        bench.up("a", vec![image(1, &["r.test/x:1"], true)]);
        let uid = bench.job("j", json!({"image": "r.test/x:1", "nodeName": "b"}), false);
        bench.decide();
        let moved = |is_unpacking| {
            let all = Progress { total: 100, transferred: 100, is_unpacking, ..Progress::default() };
            TransferEvent::Progress(all)
        };
        bench.transfer(&uid, moved(false));
        bench.pass(5);
        let mut written = Vec::new();
        for second in 0..lasts {
            bench.transfer(&uid, moved(true));
            for action in bench.pass(i64::from(second > 0)) {
                if let Action::WriteStatus { .. } = action {
                    written.push((second, bench.reason(&uid)));
                }
            }
        }
        let told = (5, (Phase::Transferring, "Unpacking".to_owned()));
        assert_eq!(written, if lasts > 5 { vec![told] } else { vec![] });
        bench.transfer(&uid, done());
        bench.decide();
        assert_eq!(bench.reason(&uid), (Phase::Imported, "Imported".into()));
    }
}

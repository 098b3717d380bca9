//! The rules on real messages.

use super::*;

#[test]
fn a_class_is_known_by_its_name_alone() {
    for class in Class::ALL {
        assert_eq!(class.name().parse(), Ok(class));
        assert!(!class.remedy().is_empty() && !class.remedy().ends_with('.'), "{class}");
    }
    let error = "ratelimited".parse::<Class>().unwrap_err().to_string();
    assert!(
        error.contains("\"ratelimited\"") && error.contains("RateLimited") && error.contains("Unknown"),
        "{error}"
    );
}

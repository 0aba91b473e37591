package conformance

import (
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// ExamineAlgorithm returns what Algorithm finds about the first of the algorithms, which may be broken.
func ExamineAlgorithm(t *testing.T, seed uint64, algorithms ...quota.Algorithm) (found []Result) {
	p := newProber(algorithms, 0, seed)
	p.walks /= 3
	p.search()
	for _, r := range algorithmRules {
		if _, scripted := algorithms[0].(driver.Scripted); r == a15 && scripted {
			p.lua(t)
		}
		found = append(found, p.result(r))
	}
	return found
}

package conformance

import "testing"

// ExamineAlgorithm returns the results of Algorithm for the first of the harness's algorithms, which may be broken.
func ExamineAlgorithm(t *testing.T, seed uint64, h AlgorithmHarness) (found []Result) {
	p := newProber(h.Algorithms, 0, seed)
	p.walks /= 3
	p.search()
	for _, r := range algorithmRules {
		if r == a15 {
			p.lua(t.Context(), h.Eval)
		}
		found = append(found, p.result(r))
	}
	return found
}

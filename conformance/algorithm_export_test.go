package conformance

import "testing"

// ExamineAlgorithm returns the results of Algorithm for the first of the harness's algorithms, which may be broken. It makes
// one of so many parts of the random walks.
func ExamineAlgorithm(t *testing.T, seed uint64, h AlgorithmHarness, part int) (found []Result) {
	p := newProber(h.Algorithms, 0, seed)
	p.walks /= part
	p.search()
	p.windows(h.Boundaries, 0)
	for _, r := range algorithmRules {
		if r == a15 {
			p.lua(t.Context(), h.Eval)
		}
		found = append(found, p.result(r))
	}
	return found
}

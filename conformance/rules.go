package conformance

// rule is a promise that stores or algorithms make.
type rule struct {
	id, name string
	text     string // the meaning, as authors read it in package quota
}

// The rules, see the package documentation.
var (
	s1 = &rule{"S1", "Meaning", "verdicts are those of Apply on the stored states at one time, the store's"}
	s2 = &rule{"S2", "AllOrNothing", "a list is charged whole or not at all, and of alternatives the first that fits alone"}
	s3 = &rule{"S3", "Traceless", "a denied list and a peek change nothing"}
	s4 = &rule{"S4", "AtMostOnce", "a call that returns nil charged once; one that returns an error charged nothing, unless the error is ErrIndeterminate"}
	s5 = &rule{"S5", "Forgetting", "state is kept at least until its ResetAfter has passed"}
	s6 = &rule{"S6", "Context", "a context that ended before the charge was sent gives the context's error"}
	s7 = &rule{"S7", "HandsOff", "after it returned, a store neither reads the charges nor writes the decisions"}
	s8 = &rule{"S8", "Close", "afterwards every call is ErrClosed, and no goroutine is left"}

	c1 = &rule{"C1", "Keys", "every limit and key has a quota of its own, whatever bytes the key has"}
	c2 = &rule{"C2", "Change", "limits with one name and different numbers share their consumption; a rule that keeps no state leaves it"}
	c3 = &rule{"C3", "IDs", "a request id is granted once and repeated faithfully; denials and peeks are not remembered"}
	c4 = &rule{"C4", "Atomic", "calls at the same time are decided as in some order, one after the other"}
	c5 = &rule{"C5", "Bounds", "never more is admitted than the limit allows, and never less"}
	c6 = &rule{"C6", "Graded", "a list beyond Atomicity is ErrCrossSlot, decided in one step all the same, or taken in parts that are given back and marked Split; alternatives beyond it are never taken in parts"}
	c7 = &rule{"C7", "Prompt", "a store that says it is prompt returns by its context's deadline"}
	c8 = &rule{"C8", "Misfit", "state of another rule under a limit's name is ErrMisconfigured, and stays as it is"}
	c9 = &rule{"C9", "Listing", "every key that stays is listed, under its limit, in pages of the size, and no key that the listing does not name"}
)

// testCase is one way of testing a rule.
type testCase struct {
	rule  *rule
	name  string
	needs []Feature
	// provisional is the version that added the case; while that is Version, failures of the case do not count.
	provisional string
	first       bool // whether it is made first, and the run ends if it fails
	run         func(*trial)
}

// cases returns all cases, rule by rule.
func cases() []*testCase {
	var all []*testCase
	for _, r := range []*rule{s1, s2, s3, s4, s5, s6, s7, s8, c1, c2, c3, c4, c5, c6, c7, c8, c9} {
		for _, list := range [][]testCase{
			answerCases, randomCases, contextCases, faultCases, panicCases, ownershipCases, closeCases, keyCases, idCases, concurrencyCases,
			processCases, realtimeCases, clockCases, atomicityCases, misfitCases, stateless, sizeCases, listingCases,
		} {
			for i := range list {
				if list[i].rule == r {
					all = append(all, &list[i])
				}
			}
		}
	}
	return all
}

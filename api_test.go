package fleetquota_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/importer"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// packages returns the public packages of this module, as the compiler exports them.
func packages(t *testing.T) []*types.Package {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-export", "-json=ImportPath,Name,Export,Module", "./...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	exports, own := map[string]string{}, []string(nil)
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath, Name, Export string
			Module                   *struct{ Main bool }
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		exports[p.ImportPath] = p.Export
		if p.Module != nil && p.Module.Main && p.Name != "main" && !internal(p.ImportPath) {
			own = append(own, p.ImportPath)
		}
	}
	imports := importer.ForCompiler(token.NewFileSet(), "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	list := make([]*types.Package, len(own))
	for i, path := range own {
		if list[i], err = imports.Import(path); err != nil {
			t.Fatal(err)
		}
	}
	return list
}

func internal(path string) bool { return strings.Contains("/"+path+"/", "/internal/") }

// leaks returns the places where the exported names of a package show a type of an internal package, which callers can
// neither name nor read about.
func leaks(p *types.Package) (places []string) {
	for _, name := range p.Scope().Names() {
		object := p.Scope().Lookup(name)
		if !object.Exported() {
			continue
		}
		note := func(place string, hidden types.Type) {
			places = append(places, fmt.Sprintf("%s.%s%s: %v", p.Path(), name, place, hidden))
		}
		typeName, isType := object.(*types.TypeName)
		switch {
		case !isType:
			show(object.Type(), "", note)
		case typeName.IsAlias():
			show(types.Unalias(object.Type()), "", note)
		default:
			named := object.Type().(*types.Named)
			show(named.Underlying(), "", note)
			for m := range named.Methods() {
				if m.Exported() {
					show(m.Type(), "."+m.Name(), note)
				}
			}
		}
	}
	return places
}

// show calls note for each internal type that a caller sees in t: by name, as an embedded or exported field, or in the
// signature of a function.
func show(t types.Type, place string, note func(place string, hidden types.Type)) {
	switch t := t.(type) {
	case *types.Alias:
		if o := t.Obj(); o.Pkg() != nil && internal(o.Pkg().Path()) {
			note(place, t)
			return
		}
		show(types.Unalias(t), place, note)
	case *types.Named:
		if o := t.Obj(); o.Pkg() != nil && internal(o.Pkg().Path()) {
			note(place, t)
		}
		for argument := range t.TypeArgs().Types() {
			show(argument, place, note)
		}
	case *types.Struct:
		for f := range t.Fields() {
			if f.Exported() || f.Embedded() {
				show(f.Type(), place+"."+f.Name(), note)
			}
		}
	case *types.Interface:
		for m := range t.ExplicitMethods() {
			if m.Exported() {
				show(m.Type(), place+"."+m.Name(), note)
			}
		}
		for e := range t.EmbeddedTypes() {
			show(e, place, note)
		}
	case *types.Signature:
		for _, tuple := range []*types.Tuple{t.Params(), t.Results()} {
			for v := range tuple.Variables() {
				show(v.Type(), place, note)
			}
		}
	case *types.Map:
		show(t.Key(), place, note)
		show(t.Elem(), place, note)
	case interface{ Elem() types.Type }: // pointer, slice, array, channel
		show(t.Elem(), place, note)
	}
}

// TestPublicTypes: no public type is made of an internal one, of which go doc shows neither methods nor fields.
func TestPublicTypes(t *testing.T) {
	list := packages(t)
	if len(list) < 10 {
		t.Fatalf("public packages: got %d, want at least 10", len(list))
	}
	for _, p := range list {
		for _, place := range leaks(p) {
			t.Errorf("a public type shows an internal one: %s", place)
		}
	}
}

// The walk finds an internal type wherever a caller can meet it.
func TestPublicTypesFindsLeaks(t *testing.T) {
	engine := types.NewPackage("example.com/backend/internal/engine", "engine")
	store := types.NewNamed(types.NewTypeName(0, engine, "Store", nil), types.NewStruct(nil, nil), nil)
	field := func(p *types.Package, name string, of types.Type, embedded bool) types.Type {
		return types.NewStruct([]*types.Var{types.NewField(0, p, name, of, embedded)}, nil)
	}
	function := func(p *types.Package, params, results []*types.Var) *types.Signature {
		return types.NewSignatureType(nil, nil, nil, types.NewTuple(params...), types.NewTuple(results...), false)
	}
	pointer := types.NewPointer(store)
	for name, test := range map[string]struct {
		declare func(p *types.Package) types.Object
		want    int
	}{
		"embedded": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "Public", nil)
			types.NewNamed(name, field(p, "Store", pointer, true), nil)
			return name
		}, 1},
		"exported field": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "Public", nil)
			types.NewNamed(name, field(p, "Stores", types.NewSlice(pointer), false), nil)
			return name
		}, 1},
		"unexported field": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "Public", nil)
			types.NewNamed(name, field(p, "store", pointer, false), nil)
			return name
		}, 0},
		"unexported type": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "private", nil)
			types.NewNamed(name, field(p, "Store", pointer, true), nil)
			return name
		}, 0},
		"alias": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "Public", nil)
			types.NewAlias(name, store)
			return name
		}, 1},
		"method": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "Public", nil)
			named := types.NewNamed(name, types.NewStruct(nil, nil), nil)
			result := types.NewVar(0, p, "", pointer)
			named.AddMethod(types.NewFunc(0, p, "Get", function(p, nil, []*types.Var{result})))
			return name
		}, 1},
		"interface": {func(p *types.Package) types.Object {
			name := types.NewTypeName(0, p, "Public", nil)
			m := types.NewFunc(0, p, "Put", function(p, []*types.Var{types.NewVar(0, p, "", pointer)}, nil))
			types.NewNamed(name, types.NewInterfaceType([]*types.Func{m}, nil).Complete(), nil)
			return name
		}, 1},
		"function": {func(p *types.Package) types.Object {
			return types.NewFunc(0, p, "New", function(p, nil, []*types.Var{types.NewVar(0, p, "", types.NewMap(types.Typ[types.String], store))}))
		}, 1},
		"variable": {func(p *types.Package) types.Object {
			return types.NewVar(0, p, "Default", types.NewChan(types.SendRecv, pointer))
		}, 1},
	} {
		p := types.NewPackage("example.com/backend/goredis", "goredis")
		p.Scope().Insert(test.declare(p))
		if got := leaks(p); len(got) != test.want {
			t.Errorf("%s: got %d leaks, %q, want %d", name, len(got), got, test.want)
		}
	}
}

// TestSizeOfQuota: package quota is for callers, and its index fits on a screen.
func TestSizeOfQuota(t *testing.T) {
	const most = 41 // Reservation came to the forty that there were
	out := command(t, "go", "doc", "-short", "./quota")
	if got := strings.Count(strings.TrimSpace(out), "\n") + 1; got > most {
		t.Errorf("lines of go doc -short ./quota: got %d, want at most %d:\n%s", got, most, out)
	}
}

// TestHealthIsDocumented: go doc shows the methods of the stores on Redis.
func TestHealthIsDocumented(t *testing.T) {
	for _, p := range []string{"goredis", "rueidis"} {
		for _, method := range []string{"Charge", "ChargeAll", "Health", "Atomicity", "Close"} {
			if out := command(t, "go", "doc", "./backend/"+p, "Store."+method); !strings.Contains(out, "func (s *Store) "+method+"(") {
				t.Errorf("go doc ./backend/%s Store.%s: got\n%s\nwant the method's signature", p, method, out)
			}
		}
	}
}

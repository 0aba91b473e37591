// Command platforms checks that the packages and tests of modules compile on platforms. Its arguments are the modules'
// folders, each with its platforms:
//
//	go run ./internal/platforms .=linux/386,windows/amd64 ./bench=linux/386
//
// It checks types from source, for compiling all dependencies takes minutes a platform. Bodies of functions of
// dependencies are left out. A package that several modules need is checked once a platform.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	c := checker{fset: token.NewFileSet(), files: map[string]*ast.File{}}
	var platforms []string
	folders := map[string][]string{} // by platform
	for _, arg := range os.Args[1:] {
		folder, list, _ := strings.Cut(arg, "=")
		for platform := range strings.SplitSeq(list, ",") {
			if !slices.Contains(platforms, platform) {
				platforms = append(platforms, platform)
			}
			folders[platform] = append(folders[platform], folder)
		}
	}
	for _, platform := range platforms {
		c.known = nil
		for _, folder := range folders[platform] {
			n, err := c.check(folder, platform)
			if err != nil {
				fmt.Fprintf(os.Stderr, "%s: %s: %v\n", folder, platform, err)
				c.failed = true
				continue
			}
			fmt.Printf("%s: %s: %d packages and tests\n", folder, platform, n)
		}
	}
	if c.failed {
		os.Exit(1)
	}
}

// pkg is a package in the output of go list.
type pkg struct {
	ImportPath, Dir string
	GoFiles         []string
	ImportMap       map[string]string
	DepOnly         bool
	Module          *struct{ GoVersion string }
	Error           *struct{ Err string }
}

type checker struct {
	fset   *token.FileSet
	files  map[string]*ast.File // parsed, by path
	known  map[string][]known   // packages of one platform, by import path
	failed bool
}

// known is a package that was checked, for a module that may be another.
type known struct {
	*types.Package
	pkg
}

// check checks one module on one platform and returns the number of its packages and tests.
func (c *checker) check(folder, platform string) (checked int, err error) {
	system, arch, ok := strings.Cut(platform, "/")
	sizes := types.SizesFor("gc", arch)
	if !ok || sizes == nil {
		return 0, errors.New("unknown platform; accepted: GOOS/GOARCH")
	}
	list, err := load(folder, system, arch)
	if err != nil {
		return 0, err
	}
	if c.known == nil {
		c.known = map[string][]known{}
	}
	done := map[string]*types.Package{"unsafe": types.Unsafe}
	for _, p := range list {
		if p.Error != nil {
			return 0, errors.New(p.Error.Err)
		}
		if done[p.ImportPath] != nil || strings.HasSuffix(p.ImportPath, ".test") { // a test's generated main
			continue
		}
		if !p.DepOnly {
			checked++
		}
		if i := slices.IndexFunc(c.known[p.ImportPath], func(k known) bool { return k.serves(&p, done) }); i >= 0 {
			done[p.ImportPath] = c.known[p.ImportPath][i].Package
			continue
		}
		var files []*ast.File
		for _, name := range p.GoFiles {
			f, err := c.parse(filepath.Join(p.Dir, name), !p.DepOnly)
			if err != nil {
				return 0, err
			}
			files = append(files, f)
		}
		config := types.Config{
			Sizes:            sizes,
			IgnoreFuncBodies: p.DepOnly,
			Importer: importer(func(path string) (*types.Package, error) {
				if mapped := p.ImportMap[path]; mapped != "" {
					path = mapped
				}
				if done[path] == nil {
					return nil, fmt.Errorf("%s is not loaded", path)
				}
				return done[path], nil
			}),
			Error: func(err error) {
				fmt.Fprintf(os.Stderr, "%s: %v\n", platform, err)
				c.failed = true
			},
		}
		if p.Module != nil && p.Module.GoVersion != "" {
			config.GoVersion = "go" + p.Module.GoVersion
		}
		// Errors are told above.
		done[p.ImportPath], _ = config.Check(p.ImportPath, c.fset, files, nil)
		c.known[p.ImportPath] = append(c.known[p.ImportPath], known{done[p.ImportPath], p})
	}
	return checked, nil
}

// serves reports whether the package is p too: of the same files, and on the same packages.
func (k *known) serves(p *pkg, done map[string]*types.Package) bool {
	return k.Dir == p.Dir && slices.Equal(k.GoFiles, p.GoFiles) && maps.Equal(k.ImportMap, p.ImportMap) && (p.DepOnly || !k.DepOnly) &&
		!slices.ContainsFunc(k.Package.Imports(), func(i *types.Package) bool { return done[i.Path()] != i })
}

// parse returns a file. Without the bodies of its functions it takes a fraction of the memory.
func (c *checker) parse(path string, bodies bool) (*ast.File, error) {
	key := fmt.Sprint(path, bodies)
	if f := c.files[key]; f != nil {
		return f, nil
	}
	f, err := parser.ParseFile(c.fset, path, nil, parser.SkipObjectResolution)
	if err == nil && !bodies {
		for _, d := range f.Decls {
			if d, ok := d.(*ast.FuncDecl); ok && d.Body != nil {
				d.Body = &ast.BlockStmt{}
			}
		}
	}
	c.files[key] = f
	return f, err
}

// load lists the module's packages and tests, each after the packages that it needs.
func load(folder, system, arch string) (list []pkg, err error) {
	cmd := exec.Command("go", "list", "-deps", "-test", "-json=ImportPath,Dir,GoFiles,ImportMap,DepOnly,Module,Error", "./...")
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "GOOS="+system, "GOARCH="+arch, "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
}

type importer func(path string) (*types.Package, error)

func (i importer) Import(path string) (*types.Package, error) { return i(path) }
